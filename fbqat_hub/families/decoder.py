"""The decoders of AutoencoderKL and AutoencoderDC as graphs."""

from __future__ import annotations

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
