"""Sana: linear attention, GLUMBConv (whose 1x1 convolutions are linear layers), DC-AE, Gemma-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fbqat_hub.families.attention import ExplicitAttention, ExplicitLinearAttention
from fbqat_hub.families.base import Family, call_arguments
from fbqat_hub.families.graph import GraphWrapper, Item, float_twin, through_own_forward


class Sana(Family):
    """SanaPipeline with SanaTransformer2DModel."""

    name: ClassVar[str] = "sana"
    title: ClassVar[str] = "Sana"
    pipeline_class: ClassVar[str] = "SanaPipeline"
    size_multiple: ClassVar[int] = 32
    denoiser_class: ClassVar[str] = "SanaTransformer2DModel"
    autoencoder_class: ClassVar[str] = "AutoencoderDC"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn1.*", "transformer_blocks.*.attn2.*"),
        "feed_forward": ("transformer_blocks.*.ff.*",),
    }
    a16_layers: ClassVar[tuple[str, ...]] = ("proj_out", "time_embed.*")
    options_without_graph: ClassVar[tuple[str, ...]] = ("guidance_embeds",)
    tiny: ClassVar[str | None] = "sana-tiny"

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        pixels = pixels.to(pipeline.vae.device, pipeline.vae.dtype)
        return pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        names = ("max_sequence_length", "complex_human_instruction", "clean_caption")
        arguments = call_arguments(pipeline, generation, names)
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def instruction(self, pipeline: Any, generation: Mapping[str, Any]) -> str:
        name = "complex_human_instruction"
        return "\n".join(call_arguments(pipeline, generation, (name,))[name] or ())

    def native_size(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().native_size(configs), "use_resolution_binning": False}

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}

    def graph(self, denoiser: Any, example: Item) -> GraphWrapper:
        self.check_graph(denoiser)
        twin = float_twin(denoiser)
        for block in twin.transformer_blocks:
            block.attn1.set_processor(ExplicitLinearAttention())
            if block.attn2 is not None:
                block.attn2.set_processor(ExplicitAttention())
        names = ("hidden_states", "encoder_hidden_states")
        return through_own_forward(twin, self.blocks(twin), twin.time_embed.emb, example, names)
