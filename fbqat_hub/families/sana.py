"""Sana: linear attention, GLUMBConv (whose 1x1 convolutions are linear layers), DC-AE, Gemma-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fbqat_hub.families.base import Family, call_arguments


class Sana(Family):
    """SanaPipeline with SanaTransformer2DModel."""

    name: ClassVar[str] = "sana"
    pipeline_class: ClassVar[str] = "SanaPipeline"
    size_multiple: ClassVar[int] = 32
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn1.*", "transformer_blocks.*.attn2.*"),
        "feed_forward": ("transformer_blocks.*.ff.*",),
    }

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        pixels = pixels.to(pipeline.vae.device, pipeline.vae.dtype)
        return pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        names = ("max_sequence_length", "complex_human_instruction", "clean_caption")
        arguments = call_arguments(pipeline, generation, names)
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def native_size(self, pipeline: Any) -> dict[str, Any]:
        side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        return {"height": side, "width": side, "use_resolution_binning": False}

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}
