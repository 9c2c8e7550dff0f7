"""Sana: linear attention, GLUMBConv (whose 1x1 convolutions are linear layers), DC-AE, Gemma-2."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fbqat_hub.families.base import Family, logit_normal


class Sana(Family):
    """SanaPipeline with SanaTransformer2DModel."""

    name: ClassVar[str] = "sana"
    pipeline_class: ClassVar[str] = "SanaPipeline"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn1.*", "transformer_blocks.*.attn2.*"),
        "feed_forward": ("transformer_blocks.*.ff.*",),
    }
    activation_overrides: ClassVar[dict[str, dict[str, Any]]] = {"proj_out": {"bits": 16}}

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        pixels = pixels.to(pipeline.vae.device, pipeline.vae.dtype)
        return pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        defaults = inspect.signature(type(pipeline).__call__).parameters
        arguments = {
            name: generation.get(name, defaults[name].default)
            for name in ("max_sequence_length", "complex_human_instruction", "clean_caption")
        }
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def native_size(self, pipeline: Any) -> dict[str, Any]:
        side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        return {"height": side, "width": side, "use_resolution_binning": False}

    def noisy(self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        t = logit_normal(progress)
        shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
        sigma = shift * t / (1 + (shift - 1) * t)
        return torch.lerp(latents, noise, sigma[:, None, None, None]), 1000 * sigma

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}
