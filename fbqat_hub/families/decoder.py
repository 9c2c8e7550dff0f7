"""The decoders of AutoencoderKL and AutoencoderDC as graphs, and that of AutoencoderKL cut at its group norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.families.attention import ExplicitAttention, ExplicitMultiscaleAttention
from fbqat_hub.families.graph import GraphWrapper, TwinModule, float_twin


class _Decoder(TwinModule):
    """Latents as the sampler leaves them -> pixels, about [-1, 1]."""

    def __init__(self, twin: nn.Module, scale: float, shift: float) -> None:
        super().__init__(twin)
        self.scale, self.shift = scale, shift

    def compute(self, *inputs: Tensor) -> Tensor:
        latents = inputs[0] * (1 / self.scale)
        output: Tensor = self.twin(latents + self.shift if self.shift else latents)
        # a reshape at the end: the compiler's layout change then happens on codes, before it, and not on floats
        return output.flatten(2)


class _Convolution(TwinModule):
    """Activation and convolution, or the upsampling: pixels next to each other, and no residual."""

    def compute(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.twin(inputs[0])
        return output.flatten(2)


class _Residual(TwinModule):
    """`skip`, through its 1x1 convolution where there is one, plus what is made of `source`, over `scale`."""

    def __init__(self, twin: nn.Module, scale: float) -> None:
        super().__init__(twin)
        self.scale = scale

    def compute(self, *inputs: Tensor) -> Tensor:
        branch, shortcut = self.twin.children()
        total = shortcut(inputs[1]) + branch(inputs[0])
        output: Tensor = total if self.scale == 1 else total / self.scale
        return output.flatten(2)


@dataclass(frozen=True, kw_only=True)
class DecoderStage:
    """What lies between two group norms of a decoder. The host normalizes, for it has all of the picture.

    Stages read and make *maps*, [1, C, H, W] of the whole picture, by name: `latents`, `stream` (the residual stream),
    `inner` (inside a residual block), `picture`.

    Attributes:
        wrapper: the graph: `source` [1, C, h, w], and `skip` [1, C', h, w] where there is one, of a tile -> `made`
            [1, C'', factor * h * factor * w]. A pixel reads its direct neighbours only, unless `whole`.
        norm: of `source`; None where it is taken as it is.
        source, skip, makes: names of maps.
        factor: rows made of a row.
        whole: reads all of the map: attention.
    """

    wrapper: GraphWrapper
    norm: nn.GroupNorm | None = None
    source: str = "stream"
    skip: str | None = None
    makes: str = "stream"
    factor: int = 1
    whole: bool = False


def has_group_norms(vae: Any) -> bool:
    """Whether mean and variance of all pixels change what the decoder makes of one."""
    return any(isinstance(module, nn.GroupNorm) for module in vae.decoder.modules())


def decoder_stages(vae: Any) -> list[DecoderStage]:
    """The decoder of an AutoencoderKL as stages that run in order; scaling included."""
    with torch.no_grad():
        return list(_stages(vae))


def _stages(vae: Any) -> Iterator[DecoderStage]:
    decoder = vae.decoder
    scale, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)
    first = nn.Sequential(getattr(vae, "post_quant_conv", None) or nn.Identity(), decoder.conv_in)
    yield DecoderStage(wrapper=_wrapper(_Decoder(float_twin(first), scale, shift)), source="latents")
    middle = decoder.mid_block
    yield from _resnet(middle.resnets[0])
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        if attention is not None:
            twin = float_twin(nn.ModuleList([attention, nn.Identity()]))
            twin[0].set_processor(ExplicitAttention())
            twin[0].group_norm, twin[0].residual_connection = None, False
            wrapper = _wrapper(_Residual(twin, 1.0))
            yield DecoderStage(wrapper=wrapper, norm=attention.group_norm, skip="stream", whole=True)
        yield from _resnet(resnet)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            yield from _resnet(resnet)
        for upsampler in block.upsamplers or ():
            yield DecoderStage(wrapper=_wrapper(_Convolution(float_twin(upsampler))), factor=2)
    last = _Convolution(float_twin(nn.Sequential(decoder.conv_act, decoder.conv_out)))
    yield DecoderStage(wrapper=_wrapper(last), norm=decoder.conv_norm_out, makes="picture")


def _resnet(block: Any) -> Iterator[DecoderStage]:
    inner = _Convolution(float_twin(nn.Sequential(block.nonlinearity, block.conv1)))
    yield DecoderStage(wrapper=_wrapper(inner), norm=block.norm1, makes="inner")
    branch = nn.Sequential(block.nonlinearity, block.conv2)
    outer = _Residual(
        float_twin(nn.ModuleList([branch, block.conv_shortcut or nn.Identity()])), block.output_scale_factor
    )
    yield DecoderStage(wrapper=_wrapper(outer), norm=block.norm2, source="inner", skip="stream")


def _wrapper(module: TwinModule) -> GraphWrapper:
    return GraphWrapper(
        module=module,
        host_inputs=lambda item: {name: item[name].float() for name in ("source", "skip") if name in item},
        output_name="made",
    )


def decoder_graph(vae: Any) -> GraphWrapper:
    """The graph of an autoencoder's decoder: `latents` [1, C, h, w] -> `picture` [1, 3, H * W]; scaling included.

    Raises:
        ValueError: linear attention that is not of ReLU.
    """
    twin = float_twin(nn.Sequential(getattr(vae, "post_quant_conv", None) or nn.Identity(), vae.decoder))
    for module in twin.modules():
        if type(module).__name__ == "Attention":
            module.set_processor(ExplicitAttention())
        elif type(module).__name__ == "SanaMultiscaleLinearAttention":
            if not isinstance(module.nonlinearity, nn.ReLU):
                kind = type(module.nonlinearity).__name__
                raise ValueError(f"linear attention of {kind} has no graph; there is one of ReLU")
            module.processor = ExplicitMultiscaleAttention()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        return GraphWrapper(
            module=_Decoder(twin, float(vae.config.scaling_factor), float(shift)),
            host_inputs=lambda item: {"latents": item["latents"].float()},
            output_name="picture",
        )
