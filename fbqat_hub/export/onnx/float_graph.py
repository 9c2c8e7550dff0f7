"""A float ONNX graph, traced from a packed model, whose every weight still knows which packed layer it is."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.families.graph import TWIN, GraphWrapper, Item, TwinModule
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.quantization.packing import pack_int4

#: Graph inputs or outputs by name.
Feed = dict[str, np.ndarray]

if TYPE_CHECKING:
    import onnx

#: The first ONNX opset with RMSNormalization; INT4 needs 21.
OPSET = 23


def packed_layers(transformer: nn.Module) -> dict[str, PackedLayer]:
    """Every packed layer of `transformer` by its module name.

    Raises:
        ExportError: there is none, or one has per-group scales.
    """
    layers = dict(named_layers(transformer, PackedLayer))
    if not layers:
        raise ExportError(
            f"{type(transformer).__name__} has no packed layer: convert the trained model first (`convert`), "
            "or load a packed checkpoint"
        )
    for name, layer in layers.items():
        if tuple(layer.weight_scale.shape) != (layer.out_features,):
            raise ExportError(
                f"layer {name!r} has per-group weight scales {tuple(layer.weight_scale.shape)}; the export takes "
                f"one scale per output channel ({layer.out_features}): train with granularity 'per_channel'"
            )
    return layers


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
    layers: dict[str, PackedLayer]
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


def trace(wrapper: GraphWrapper, example: Item, layers: Mapping[str, PackedLayer]) -> FloatGraph:
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
    from onnx import helper, numpy_helper

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    shapes = {item.name: list(item.dims) for item in model.graph.initializer if item.name in graph.layers}
    kept = [item for item in model.graph.initializer if item.name not in graph.layers]
    dequantize = {}
    for name, shape in shapes.items():
        layer = graph.layers[name]
        kept.append(codes_tensor(f"{name}/codes", layer.codes(), shape, Precision().stored_bits(layer)))
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


def codes_tensor(name: str, codes: Tensor, shape: Sequence[int], bits: int) -> onnx.TensorProto:
    """Codes (int8) as an ONNX constant of that shape: INT4, two a byte, if `bits` is 4; INT8 if it is 8."""
    from onnx import TensorProto, helper

    packed = pack_int4(codes.flatten()) if bits == 4 else codes
    kind = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    return helper.make_tensor(name, kind, shape, packed.cpu().numpy().tobytes(), raw=True)


def as_feed(inputs: Mapping[str, Tensor]) -> Feed:
    """Graph inputs as ONNX Runtime takes them: contiguous float32 arrays."""
    return {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in inputs.items()}
