"""From a packed transformer to a float ONNX graph whose every weight still knows which packed layer it is.

The packed model is copied into a *float twin*: each packed layer becomes a float layer of the same shape, written in
the form the compiler wants, whose weight is never filled in: the graph takes the codes instead. Linear layers become
`Reshape -> Gemm -> Reshape` (one matrix product with its bias, which the HTP runs as one FullyConnected; `MatMul + Add`
would cost an extra requantization). The exporter keeps parameter names, so the ONNX initializer `twin.proj_out.weight`
is the packed layer `proj_out`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.quantization.packed import PackedLinear, PackedPointwiseConv2d
from fbqat_hub.quantization.packing import pack_int4

#: Graph inputs or outputs by name.
Feed = dict[str, np.ndarray]

if TYPE_CHECKING:
    import onnx

#: The first ONNX opset with RMSNormalization; INT4 needs 21.
OPSET = 23
#: The attribute under which a wrapper module holds the twin; initializer names start with it.
TWIN = "twin"


class RowLinear(nn.Module):
    """`nn.Linear` over flattened rows: [..., in] -> [rows, in] -> Gemm -> [rows, out] -> [..., out], float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        rows = F.linear(hidden_states.reshape(-1, shape[-1]), self.weight, self.bias)
        return rows.reshape(*shape[:-1], self.weight.shape[0])


def _stand_in(layer: nn.Module, number: int) -> nn.Module | None:
    """The float layer that stands for `layer` in the twin, or None where `layer` stays as it is.

    A packed layer's weight is one number, expanded to the weight's shape: the graph needs its name and shape, and what
    runs the graph takes the codes (`runnable`). A model whose float weights fill the memory is so traced in little. The
    numbers differ, or the exporter would make one constant of weights of one shape.
    """
    if isinstance(layer, PackedLinear):
        weight = torch.full((), 1e-6 * (1 + number)).expand(layer.out_features, layer.in_features)
        if not isinstance(layer, PackedPointwiseConv2d):
            return RowLinear(weight, layer.bias)
        convolution = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None, device="meta")
        convolution.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
        if layer.bias is not None:
            convolution.bias = nn.Parameter(layer.bias.detach().float().clone(), requires_grad=False)
        return convolution
    if type(layer) is nn.Linear:
        return RowLinear(layer.weight.detach().float().clone(), layer.bias)
    return None


def packed_layers(transformer: nn.Module) -> dict[str, PackedLinear]:
    """Every packed layer of `transformer` by its module name.

    Raises:
        ExportError: there is none, or one has per-group scales, or more than 4 bits.
    """
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, PackedLinear)}
    if not layers:
        raise ExportError(
            f"{type(transformer).__name__} has no packed layer: convert the trained model first (`convert`), "
            "or load a packed checkpoint"
        )
    for name, layer in layers.items():
        if layer.weight_bits > 4:
            raise ExportError(
                f"layer {name!r} has weights of {layer.weight_bits} bits; the HTP export takes 4-bit ones: export "
                "a model of 4 bits"
            )
        if tuple(layer.weight_scale.shape) != (layer.out_features,):
            raise ExportError(
                f"layer {name!r} has per-group weight scales {tuple(layer.weight_scale.shape)}; the HTP export takes "
                f"one scale per output channel ({layer.out_features}): train with granularity 'per_channel'"
            )
    return layers


def float_twin(transformer: nn.Module) -> nn.Module:
    """A float32 copy of `transformer` on the CPU, in eval mode, with stand-ins for packed layers: for tracing only."""
    replaced: dict[int, nn.Module] = {}
    for number, module in enumerate(transformer.modules()):
        float_layer = _stand_in(module, number)
        if float_layer is not None:
            replaced[id(module)] = float_layer
    # deepcopy takes what is in `memo` as already copied: the packed layers are never copied themselves.
    twin = copy.deepcopy(transformer, memo=dict(replaced))
    # nn.Module.to, not diffusers' own: that one warns about modules to keep in float32, and all are
    return nn.Module.to(twin, device="cpu", dtype=torch.float32).eval()


@dataclass(frozen=True)
class GraphWrapper:
    """A module of positional tensors around a twin, and how a person's inputs become its inputs.

    Attributes:
        module: forward takes the tensors of `host_inputs` in order. A `TwinModule`, whose blocks' outputs keep their
            names in the graph, so that they can be compared and the graph be cut there; or any module of one output.
        host_inputs: keyword arguments of the transformer's forward -> the graph's inputs, float32, batch 1
            (what is cheap or impossible on the HTP, such as sin/cos of the timestep, happens here).
        output_name: the name of the graph's one output.
    """

    module: nn.Module
    host_inputs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    output_name: str = "sample"


def block_output_name(block: str, place: int) -> str:
    """The graph's name of a block's output; `place` counts where a block has several, 0 is the picture's stream."""
    return f"{block}/output_{place}"


def block_of(output: str) -> str:
    """The block whose output is called that.

    >>> block_of("transformer_blocks.3/output_0")
    'transformer_blocks.3'
    """
    return output.rpartition("/")[0]


def blocks_of_outputs(outputs: Sequence[str]) -> list[str]:
    """The blocks whose outputs are called that, in order."""
    return list(dict.fromkeys(block_of(name) for name in outputs))


@contextlib.contextmanager
def block_outputs(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Within the block of code, every forward of `model` fills the yielded mapping with its blocks' outputs by name.

    A block of two streams returns (text, picture); the picture's comes first here. Absent ones (None) are left out.
    """
    found: dict[str, Tensor] = {}

    def hook(block: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            streams = reversed(output) if isinstance(output, tuple) else [output]
            found.update(
                {block_output_name(block, place): item for place, item in enumerate(streams) if item is not None}
            )

        return keep

    handles = [model.get_submodule(block).register_forward_hook(hook(block)) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class TwinModule(nn.Module, ABC):
    """A twin, a forward of positional tensors (`compute`), and the outputs of some of the twin's blocks behind its own.

    Args:
        blocks: names of submodules of `twin`.
    """

    def __init__(self, twin: nn.Module, blocks: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.twin, self.blocks = twin, blocks

    @abstractmethod
    def compute(self, *inputs: Tensor) -> Tensor:
        """The graph's output."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with block_outputs(self.twin, self.blocks) as found:
            output = self.compute(*inputs)
        return (output, *found.values())

    def block_output_names(self, *inputs: Tensor) -> list[str]:
        """Names of what `forward` returns behind its first output."""
        with block_outputs(self.twin, self.blocks) as found, torch.no_grad():
            self.compute(*inputs)
        return list(found)


@dataclass(frozen=True)
class FloatGraph:
    """A float ONNX graph with provenance.

    Attributes:
        model: ONNX model, float32, static shapes, opset 23. The initializers of packed weights have a shape and no
            data; `runnable` gives a model that computes.
        layers: initializer name of a weight -> the packed layer it came from.
        module_names: initializer name of a weight -> module name (of every parameter named `*.weight`).
        block_outputs: names of the tensors that are outputs of blocks (`block_output_name`), in order.
    """

    model: onnx.ModelProto
    layers: dict[str, PackedLinear]
    module_names: dict[str, str]
    block_outputs: tuple[str, ...] = ()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter prints and warns about packages this project does not use; keep a person's terminal clean."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def trace(wrapper: GraphWrapper, example: Mapping[str, Tensor], layers: Mapping[str, PackedLinear]) -> FloatGraph:
    """Export `wrapper` at the shapes of `example` (keyword arguments of the transformer's forward).

    Raises:
        ExportError: torch's exporter failed, or the weight of a packed layer is not in the graph under its name.
    """
    from onnx import TensorProto
    from onnxscript.optimizer import remove_unused_nodes

    inputs = wrapper.host_inputs(example)
    named = wrapper.module.block_output_names(*inputs.values()) if isinstance(wrapper.module, TwinModule) else []
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                wrapper.module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=list(inputs),
                output_names=[wrapper.output_name, *named],
                external_data=False,
            )
    except Exception as error:
        raise ExportError(f"torch.onnx.export failed: {type(error).__name__}: {error}") from error
    assert program is not None
    by_initializer = {f"{TWIN}.{name}.weight": layer for name, layer in layers.items()}
    constants = program.model.graph.initializers
    empty = [
        TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[int(side) for side in constants.pop(name).shape])
        for name in by_initializer
        if name in constants
    ]
    model = program.model_proto
    model.graph.initializer.extend(empty)
    model.graph.value_info.extend(model.graph.output[1:])
    del model.graph.output[1:]
    remove_unused_nodes(model)  # the last block's text stream ends in nothing
    used = {name for node in model.graph.node for name in node.input}
    named = [name for name in named if name in used]
    missing = [name for name in layers if f"{TWIN}.{name}.weight" not in used]
    if missing:
        raise ExportError(
            f"the weights of {len(missing)} packed layers are not in the exported graph (first: {missing[0]!r}); "
            "is the layer used by this model's forward?"
        )
    module_names = {
        item.name: item.name.removeprefix(f"{TWIN}.").removesuffix(".weight")
        for item in model.graph.initializer
        if item.name.endswith(".weight")
    }
    return FloatGraph(model=model, layers=by_initializer, module_names=module_names, block_outputs=tuple(named))


def runnable(graph: FloatGraph) -> onnx.ModelProto:
    """`graph.model` with the packed layers' codes, dequantized as it runs: a layer at a time is in float."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    shapes = {item.name: list(item.dims) for item in model.graph.initializer if item.name in graph.layers}
    kept = [item for item in model.graph.initializer if item.name not in graph.layers]
    dequantize = {}
    for name, shape in shapes.items():
        layer = graph.layers[name]
        raw = pack_int4(layer.codes().flatten()).cpu().numpy().tobytes()
        kept.append(helper.make_tensor(f"{name}/codes", TensorProto.INT4, shape, raw, raw=True))
        kept.append(numpy_helper.from_array(layer.weight_scale.detach().cpu().float().numpy(), f"{name}/scale"))
        dequantize[name] = helper.make_node("DequantizeLinear", [f"{name}/codes", f"{name}/scale"], [name], axis=0)
    nodes = []
    for node in model.graph.node:  # a weight stands before its first reader, where `exact_session` runs it
        nodes += [dequantize.pop(name) for name in node.input if name in dequantize]
        nodes.append(node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    return model


def as_feed(inputs: Mapping[str, Tensor]) -> Feed:
    """Graph inputs as ONNX Runtime takes them: contiguous float32 arrays."""
    return {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in inputs.items()}
