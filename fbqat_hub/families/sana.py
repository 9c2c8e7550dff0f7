"""Sana, Sana 1.5 and Sana-Sprint: linear attention, GLUMBConv (whose 1x1 convolutions are linear layers), DC-AE,
Gemma-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fbqat_hub.families.attention import ExplicitAttention, ExplicitLinearAttention
from fbqat_hub.families.base import FEW_STEPS, Family, call_arguments, logit_normal
from fbqat_hub.families.graph import GraphWrapper, Item, float_twin, through_own_forward

# What of the pipeline call is about its texts.
_OF_TEXT = ("max_sequence_length", "complex_human_instruction", "clean_caption")


class Sana(Family):
    """SanaPipeline with SanaTransformer2DModel; Sana 1.5's norms of queries and keys (``qk_norm``) included."""

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
    patch_side: ClassVar[int] = 1
    tiny: ClassVar[str | None] = "sana-tiny"

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        pixels = pixels.to(pipeline.vae.device, pipeline.vae.dtype)
        return pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, _OF_TEXT)
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def encode_no_prompt(self, pipeline: Any, generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Without the instruction that stands before other prompts."""
        return super().encode_no_prompt(pipeline, {**generation, "complex_human_instruction": None})

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        tokens = self.text_tokens(generation)
        return {"encoder_hidden_states": (tokens, config["caption_channels"]), "encoder_attention_mask": (tokens,)}

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
        embed = twin.time_embed if denoiser.config.guidance_embeds else twin.time_embed.emb
        return through_own_forward(twin, self.blocks(twin), embed, example, names)


class SanaSprint(Sana):
    """SanaSprintPipeline: a Sana distilled into 1 to 4 steps (arXiv 2503.09641), with the guidance scale as an input.

    Its sampler (``SCMScheduler``) goes along x_t = cos(t) x_0 + sin(t) noise, t in radians, latents and noise of
    deviation ``sigma_data``. The denoiser is one of flow matching: it is given x_t / (cos(t) + sin(t)) at the noise
    level sin(t) / (cos(t) + sin(t)), and predicts noise - x_0, all over ``sigma_data``. Timesteps here are angles.
    """

    name: ClassVar[str] = "sana-sprint"
    title: ClassVar[str] = "Sana-Sprint"
    pipeline_class: ClassVar[str] = "SanaSprintPipeline"
    may_be_none: ClassVar[frozenset[str]] = frozenset({"intermediate_timesteps"})  # with other steps than two
    without_bundle: ClassVar[str] = "its sampler adds noise of its own between the steps, which the runner cannot"
    tiny: ClassVar[str | None] = None

    #: The pipeline call's own angles of its two steps; with other numbers of steps they lie evenly from the first to 0.
    angles: ClassVar[tuple[float, float]] = (1.57080, 1.3)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        embeds, mask = pipeline.encode_prompt(list(prompts), **call_arguments(pipeline, generation, _OF_TEXT))
        scale = call_arguments(pipeline, generation, ("guidance_scale",))["guidance_scale"]
        guidance = torch.full((len(embeds),), float(scale)).to(embeds)
        return {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "guidance": guidance * pipeline.transformer.config.guidance_embeds_scale,
        }

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        return {**super().conditioning_shapes(config, generation), "guidance": ()}

    def noisy(
        self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor, steps: int = 0
    ) -> tuple[Tensor, Tensor]:
        """cos(t) x_0 + sin(t) noise, over ``sigma_data``; t is one of the sampler's angles, each as often."""
        first = self.angles[0]
        if 0 < steps <= FEW_STEPS:
            angles = self.angles if steps == 2 else torch.linspace(first, 0, steps + 1)[:-1]
            angle = self._at(torch.as_tensor(angles), progress)
        else:
            angle = first * logit_normal(progress)
        cosine, sine = (value[:, None, None, None] for value in (angle.cos(), angle.sin()))
        return cosine * latents + sine * noise, angle

    def following(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """No ``intermediate_timesteps``, which the call has of two steps only."""
        return {"intermediate_timesteps": None} if self.sampler_steps(call) != 2 else {}

    def noisy_of_sampler(self, scheduler: Any, latents: Tensor) -> Tensor:
        return latents / scheduler.config.sigma_data

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        level = timestep.sin() / (timestep.cos() + timestep.sin())
        share = level.view(-1, 1, 1, 1)
        hidden_states = noisy * torch.sqrt(share**2 + (1 - share) ** 2)
        return {"hidden_states": hidden_states, "timestep": level, **conditioning}
