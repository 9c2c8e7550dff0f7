"""A denoiser, or another part of a pipeline, as a torch module of positional tensors that torch.onnx.export can trace.

The packed model is copied into a *float twin*: each packed layer becomes a float layer of the same shape, whose weight
is never filled in, since the graph takes the codes instead. Linear layers become `Reshape -> Gemm -> Reshape` (one
matrix product with its bias, which the HTP runs as one FullyConnected; `MatMul + Add` would cost an extra
requantization). The exporter keeps parameter names, so the ONNX initializer `twin.proj_out.weight` is the packed layer
`proj_out`. Around the twin a `TwinModule` runs the family's forward, and a `GraphWrapper` says how a person's inputs
become the graph's.

What differs from diffusers' forward, none of it in exact arithmetic beyond float rounding: sin/cos of the timestep and
the text mask's bias are computed on the host; rotary positions are constants; attention is explicit (`attention`).
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbqat_hub.quantization.packed import PackedLayer, PackedPointwiseConv2d

#: Keyword arguments of a denoiser's forward, batch 1.
Item = Mapping[str, Tensor]

#: The attribute under which a wrapper module holds the twin; initializer names start with it.
TWIN = "twin"
#: Added to the denoiser's attention score of a padded text token. exp(-30) = 1e-13 of the weight of a real one, while
#: diffusers' -10000 would stretch the range of the scores until 16 bits hold nothing else.
MASK_BIAS = -30.0


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
    runs the graph takes the codes. A model whose float weights fill the memory is so traced in little. The numbers
    differ, or the exporter would make one constant of weights of one shape.
    """
    if isinstance(layer, PackedLayer):
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


def float_twin(model: nn.Module) -> Any:
    """A float32 copy of `model` on the CPU, in eval mode, with stand-ins for packed layers: for tracing only."""
    replaced: dict[int, nn.Module] = {}
    for number, module in enumerate(model.modules()):
        float_layer = _stand_in(module, number)
        if float_layer is not None:
            replaced[id(module)] = float_layer
    # deepcopy takes what is in `memo` as already copied: the packed layers are never copied themselves.
    twin = copy.deepcopy(model, memo=dict(replaced))
    # nn.Module.to, not diffusers' own: that one warns about modules to keep in float32, and all are
    return nn.Module.to(twin, device="cpu", dtype=torch.float32).eval()


@dataclass(frozen=True)
class GraphWrapper:
    """A module of positional tensors around a twin, and how a person's inputs become its inputs.

    Attributes:
        module: forward takes the tensors of `host_inputs` in order. A `TwinModule`, whose blocks' outputs keep their
            names in the graph, so that they can be compared and the graph be cut there; or any module of one output.
        host_inputs: keyword arguments of the model's forward -> the graph's inputs, float32, batch 1 (what is cheap or
            impossible on the device, such as sin/cos of the timestep, happens here).
        output_name: the name of the graph's one output.
    """

    module: nn.Module
    host_inputs: Callable[[Item], dict[str, Tensor]]
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
def block_outputs(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
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

    def __init__(self, twin: nn.Module, blocks: Sequence[str] = ()) -> None:
        super().__init__()
        self.twin, self.blocks = twin, tuple(blocks)

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


class OwnForward(TwinModule):
    """The twin's own forward, with positional tensors for the keyword arguments `names`."""

    def __init__(self, twin: nn.Module, blocks: Sequence[str], names: Sequence[str]) -> None:
        super().__init__(twin, blocks)
        self.names = tuple(names)

    def compute(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.twin(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]
        return output


def host_inputs(
    time_proj: nn.Module, names: Sequence[str], time_scale: float = 1.0, guidance_proj: nn.Module | None = None
) -> Callable[[Item], dict[str, Tensor]]:
    """What the host makes of a denoiser's keyword arguments: the inputs of its graph, float32.

    Args:
        time_proj: the sin/cos projection of the timestep, taken out of the twin.
        names: arguments that stay as they are.
        time_scale: what the denoiser multiplies its timestep, and its guidance, by before the projection.
        guidance_proj: the sin/cos projection of the guidance scale, of a denoiser that is told it.

    Returns:
        A function of an item -> `names`; `timestep_embedding`, the sin/cos [1, 256]; where the denoiser is told the
        guidance scale, `guidance_embedding` [1, 256]; where the item has an `encoder_attention_mask`,
        `encoder_attention_bias` [1, 1, tokens], 0 where the mask is 1 and `MASK_BIAS` where it is 0.
    """

    def inputs(item: Item) -> dict[str, Tensor]:
        made = {name: item[name].float() for name in names}
        made["timestep_embedding"] = time_proj(time_scale * item["timestep"].reshape(-1).float()).float()
        if guidance_proj is not None:
            made["guidance_embedding"] = guidance_proj(time_scale * item["guidance"].reshape(-1).float()).float()
        if (mask := item.get("encoder_attention_mask")) is not None:
            made["encoder_attention_bias"] = ((1.0 - mask.float()) * MASK_BIAS)[:, None]
        return made

    return inputs


def with_constants(
    made: Callable[[Item], dict[str, Tensor]], example: Item, names: Sequence[str]
) -> Callable[[Item], dict[str, Tensor]]:
    """`made`, refusing an item whose arguments `names` are not those of `example`, which are constants of the graph."""

    def inputs(item: Item) -> dict[str, Tensor]:
        for name in names:
            if not torch.equal(item[name], example[name]):
                raise ValueError(
                    f"an item's {name} differ from the first item's; positions are constants of the graph, so "
                    "export for one picture size and one number of text tokens."
                )
        return made(item)

    return inputs


def through_own_forward(
    twin: Any, blocks: Sequence[str], embed: Any, example: Item, names: Sequence[str]
) -> GraphWrapper:
    """A wrapper around the twin's own forward, whose sin/cos of the timestep (`embed.time_proj`), and of the guidance
    scale where it is told that (`embed.guidance_condition_proj`), is the host's work.

    Args:
        blocks: names of the twin's blocks.
        example: an item; says whether there are a guidance scale and a text mask.
        names: arguments of the forward besides timestep and mask.
    """
    time_proj, embed.time_proj = embed.time_proj, nn.Identity()
    guidance_proj = None
    if "guidance" in example:
        guidance_proj, embed.guidance_condition_proj = embed.guidance_condition_proj, nn.Identity()
    told = [name for name in ("guidance", "encoder_attention_mask") if name in example]
    module = OwnForward(twin, blocks, [*names, "timestep", *told])
    return GraphWrapper(module=module, host_inputs=host_inputs(time_proj, names, guidance_proj=guidance_proj))
