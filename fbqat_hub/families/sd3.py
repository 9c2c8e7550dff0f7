"""Stable Diffusion 3 and 3.5: MM-DiT blocks over picture and text, CLIP twice and T5, flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fbqat_hub.families.attention import ExplicitJointAttention
from fbqat_hub.families.base import Family, Original, call_arguments
from fbqat_hub.families.graph import GraphWrapper, Item, float_twin, through_own_forward

#: Module of a block in diffusers -> in the original checkpoint.
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
}
# The last block gives no text.
_NOT_LAST = {
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_DUAL = {
    name.replace("attn.", "attn2."): original.replace(".attn.", ".attn2.")
    for name, original in _BLOCK.items()
    if original.startswith("x_block.attn.")
}
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
    most_text_tokens: ClassVar[int] = 512
    tiny: ClassVar[str | None] = "sd3-tiny"

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._encoded(pipeline, [list(prompts)] * 3, generation)

    def encode_no_prompt(self, pipeline: Any, generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each text encoder may have a negative prompt of its own."""
        first = generation.get("negative_prompt") or ""
        others = (generation.get(name) or first for name in ("negative_prompt_2", "negative_prompt_3"))
        return self._encoded(pipeline, [[first], *([text] for text in others)], generation)

    def _encoded(self, pipeline: Any, texts: Sequence[list[str]], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """As ``encode_prompts``, of the prompts for each of the three text encoders."""
        arguments = call_arguments(pipeline, generation, ("max_sequence_length", "clip_skip"))
        embeds, _, pooled, _ = pipeline.encode_prompt(*texts, do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        tokens = _CLIP_TOKENS + self.text_tokens(generation)
        pooled = config["pooled_projection_dim"]
        return {"encoder_hidden_states": (tokens, config["joint_attention_dim"]), "pooled_projections": (pooled,)}

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}

    def original_modules(self, config: Mapping[str, Any]) -> dict[str, Original]:
        """Those of Stability AI's checkpoints."""
        found = {
            "pos_embed.pos_embed": Original("pos_embed"),
            "pos_embed.proj": Original("x_embedder.proj"),
            "context_embedder": Original("context_embedder"),
        }
        for name, original in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
            for linear, layer in (("linear_1", "mlp.0"), ("linear_2", "mlp.2")):
                found[f"time_text_embed.{name}.{linear}"] = Original(f"{original}.{layer}")
        last = config["num_layers"] - 1
        for index in range(config["num_layers"]):
            dual = _DUAL if index in config["dual_attention_layers"] else {}
            for name, original in (_BLOCK | dual | ({} if index == last else _NOT_LAST)).items():
                swapped = index == last and name == "norm1_context.linear"
                found[f"transformer_blocks.{index}.{name}"] = Original(f"joint_blocks.{index}.{original}", swapped)
        found["norm_out.linear"] = Original("final_layer.adaLN_modulation.1", halves_swapped=True)
        return found | {"proj_out": Original("final_layer.linear")}

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
