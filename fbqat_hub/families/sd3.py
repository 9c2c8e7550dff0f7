"""Stable Diffusion 3 and 3.5: MM-DiT blocks over picture and text, CLIP twice and T5, flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fbqat_hub.families.attention import ExplicitJointAttention
from fbqat_hub.families.base import Family, call_arguments
from fbqat_hub.families.graph import GraphWrapper, Item, float_twin, through_own_forward

# Before those of T5 in the text.
_CLIP_TOKENS = 77


class StableDiffusion3(Family):
    """StableDiffusion3Pipeline with SD3Transformer2DModel; SD3.5-Medium's dual attention (``attn2``) included."""

    name: ClassVar[str] = "sd3"
    title: ClassVar[str] = "SD3.5"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    denoiser_class: ClassVar[str] = "SD3Transformer2DModel"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn.*", "transformer_blocks.*.attn2.*"),
        "feed_forward": ("transformer_blocks.*.ff.*", "transformer_blocks.*.ff_context.*"),
    }
    a16_layers: ClassVar[tuple[str, ...]] = (
        "proj_out",
        "time_text_embed.*",
        "norm_out.linear",
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
    )
    tiny: ClassVar[str | None] = "sd3-tiny"

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length", "clip_skip"))
        texts = list(prompts)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, **arguments
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        tokens = _CLIP_TOKENS + self.text_tokens(generation)
        pooled = config["pooled_projection_dim"]
        return {"encoder_hidden_states": (tokens, config["joint_attention_dim"]), "pooled_projections": (pooled,)}

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}

    def graph(self, denoiser: Any, example: Item) -> GraphWrapper:
        twin = float_twin(denoiser)
        twin.set_attn_processor(ExplicitJointAttention())
        position, sides = twin.pos_embed, example["hidden_states"].shape[-2:]
        with torch.no_grad():  # the crop for this size becomes the table of a smaller model
            position.pos_embed = position.cropped_pos_embed(*sides)
        position.pos_embed_max_size = None
        position.height, position.width = (side // position.patch_size for side in sides)
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
        return through_own_forward(twin, self.blocks(twin), twin.time_text_embed, example, names)
