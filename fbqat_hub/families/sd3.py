"""Stable Diffusion 3 and 3.5: MM-DiT blocks over picture and text, CLIP twice and T5, flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fbqat_hub.families.base import Family, call_arguments


class StableDiffusion3(Family):
    """StableDiffusion3Pipeline with SD3Transformer2DModel; SD3.5-Medium's dual attention (``attn2``) included."""

    name: ClassVar[str] = "sd3"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn.*", "transformer_blocks.*.attn2.*"),
        "feed_forward": ("transformer_blocks.*.ff.*", "transformer_blocks.*.ff_context.*"),
    }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length", "clip_skip"))
        texts = list(prompts)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, **arguments
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def native_size(self, pipeline: Any) -> dict[str, Any]:
        side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        return {"height": side, "width": side}

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}
