"""FLUX.1-schnell: double- and single-stream blocks with rotary positions, CLIP and T5, a picture in four steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fbqat_hub.families.base import Family, call_arguments

_STEPS = 4  # what FLUX.1-schnell is drawn with


class Flux(Family):
    """FluxPipeline with FluxTransformer2DModel without guidance embedding (schnell).

    The denoiser takes tokens: 2 x 2 latents packed into one, [N, H/2 * W/2, 4 C].
    """

    name: ClassVar[str] = "flux"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*", "single_transformer_blocks.*"),
        "attention": ("transformer_blocks.*.attn.*", "single_transformer_blocks.*.attn.*"),
        "feed_forward": (
            "transformer_blocks.*.ff.*",
            "transformer_blocks.*.ff_context.*",
            "single_transformer_blocks.*.proj_mlp",
            "single_transformer_blocks.*.proj_out",
        ),
    }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length",))
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), **arguments)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def native_size(self, pipeline: Any) -> dict[str, Any]:
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        return {"height": side, "width": side}

    def noisy(
        self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor, *, few_step: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Flow matching; with ``few_step`` at one of the four times 1, 3/4, 1/2 and 1/4 that the sampler visits."""
        if not few_step:
            return super().noisy(scheduler, latents, noise, progress)
        sigma = (progress * _STEPS).ceil() / _STEPS
        return torch.lerp(latents, noise, sigma[:, None, None, None]), 1000 * sigma

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The velocity, as tokens."""
        return pack(noise - latents)

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        height, width = noisy.shape[-2:]
        return self.token_inputs(pack(noisy), height, width, timestep, conditioning)

    def token_inputs(
        self, tokens: Tensor, height: int, width: int, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser's forward from packed latents [N, height/2 * width/2, 4 C]."""
        rows, columns = height // 2, width // 2
        positions = torch.zeros(rows, columns, 3)
        positions[..., 1] += torch.arange(rows)[:, None]
        positions[..., 2] += torch.arange(columns)
        text_tokens = conditioning["encoder_hidden_states"].shape[1]
        return {
            "hidden_states": tokens,
            "timestep": timestep / 1000,
            "img_ids": positions.view(-1, 3),
            "txt_ids": torch.zeros(text_tokens, 3),
            **conditioning,
        }


def pack(latents: Tensor) -> Tensor:
    """Latents [N, C, H, W] as tokens [N, H/2 * W/2, 4 C], each channel's 2 x 2 square in reading order."""
    count, channels, height, width = latents.shape
    squares = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(count, height // 2 * (width // 2), 4 * channels)
