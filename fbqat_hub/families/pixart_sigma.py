"""PixArt-Sigma: cross-attention to T5, one adaptive norm shared by all blocks, noise prediction (DDPM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fbqat_hub.families.attention import ExplicitAttention
from fbqat_hub.families.base import FEW_STEPS, Family, call_arguments
from fbqat_hub.families.graph import GraphWrapper, Item, float_twin, through_own_forward


class PixArtSigma(Family):
    """PixArtSigmaPipeline with PixArtTransformer2DModel."""

    name: ClassVar[str] = "pixart-sigma"
    title: ClassVar[str] = "PixArt-Sigma"
    pipeline_class: ClassVar[str] = "PixArtSigmaPipeline"
    denoiser_class: ClassVar[str] = "PixArtTransformer2DModel"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn1.*", "transformer_blocks.*.attn2.*"),
        "feed_forward": ("transformer_blocks.*.ff.*",),
    }
    a16_layers: ClassVar[tuple[str, ...]] = ("proj_out", "adaln_single.*")
    options_without_graph: ClassVar[tuple[str, ...]] = ("use_additional_conditions",)
    tiny: ClassVar[str | None] = "pixart-sigma-tiny"

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length", "clean_caption"))
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        tokens = self.text_tokens(generation)
        return {"encoder_hidden_states": (tokens, config["caption_channels"]), "encoder_attention_mask": (tokens,)}

    def native_size(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().native_size(configs), "use_resolution_binning": False}

    def noisy(
        self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor, steps: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t the product of 1 - beta up to t (DDPM); t uniform."""
        products = scheduler.alphas_cumprod
        if 0 < steps <= FEW_STEPS:
            timestep = self.sampler_times(scheduler, latents, progress, steps).long()
        else:
            timestep = (progress * len(products)).long()
        share = products[timestep].to(latents)[:, None, None, None]
        return share.sqrt() * latents + (1 - share).sqrt() * noise, timestep

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The noise."""
        return noise

    def error_weight(self, scheduler: Any, timestep: Tensor) -> Tensor:
        """beta^2 / (1 - a) over its mean, for a sampler of evenly spaced timesteps.

        With cos(phi) = sqrt(a), a step of the probability-flow ODE is d phi times the velocity, whose error is that of
        the noise over sqrt(a). Squared that is (d phi / dt)^2 / a = beta^2 / (4 (1 - a)): eight times as much at
        t = 900 as at t = 100.
        """
        weight = scheduler.betas.square() / (1 - scheduler.alphas_cumprod)
        return (weight / weight.mean()).to(timestep.device)[timestep]

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}

    def prediction(self, output: Tensor) -> Tensor:
        """The noise; the second half of the channels is the learned variance, which no sampler here uses."""
        return output.chunk(2, dim=1)[0]

    def graph(self, denoiser: Any, example: Item) -> GraphWrapper:
        self.check_graph(denoiser)
        twin = float_twin(denoiser)
        for block in twin.transformer_blocks:
            block.attn1.set_processor(ExplicitAttention())
            block.attn2.set_processor(ExplicitAttention())
        names = ("hidden_states", "encoder_hidden_states")
        return through_own_forward(twin, self.blocks(twin), twin.adaln_single.emb, example, names)
