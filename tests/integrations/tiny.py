"""Tiny denoisers of every family, packed, and arguments of their forward at any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import get_family
from fbqat_hub.integrations.diffusers import attach
from fbqat_hub.quantization import convert, prepare


def pack_denoiser(pipeline: Any, family: str) -> Any:
    """The pipeline's denoiser, packed in place as quantize-on-load packs it."""
    config = FBQATConfig(module_overrides=get_family(family).activation_overrides)
    prepare(pipeline.transformer, config.weight_scheme(), config.activation_scheme(), overrides=config.module_overrides)
    convert(pipeline.transformer)
    attach(pipeline.transformer, config)
    return pipeline.transformer


def denoiser_inputs(
    family: str, model: Any, batch: int = 2, height: int = 4, width: int = 4, text_tokens: int = 8
) -> dict[str, Any]:
    """Random arguments of the denoiser's forward for latents of a height and a width, the same at every call."""
    random = torch.Generator().manual_seed(batch)
    config = model.config
    channels = config.in_channels // 4 if family == "flux" else config.in_channels
    text_width = config.get("caption_channels") or config.joint_attention_dim
    conditioning = {"encoder_hidden_states": torch.randn(batch, text_tokens, text_width, generator=random)}
    if "pooled_projection_dim" in config:
        conditioning["pooled_projections"] = torch.randn(batch, config.pooled_projection_dim, generator=random)
    else:
        conditioning["encoder_attention_mask"] = torch.ones(batch, text_tokens)
    latents = torch.randn(batch, channels, height, width, generator=random)
    timestep = torch.linspace(100.0, 900.0, batch)
    inputs: dict[str, Any] = dict(get_family(family).denoiser_inputs(latents, timestep, conditioning))
    if family == "pixart-sigma":
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return inputs


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The float tensors of ``inputs`` in another dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
