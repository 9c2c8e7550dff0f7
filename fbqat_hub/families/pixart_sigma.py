"""PixArt-Sigma: cross-attention to T5, one adaptive norm shared by all blocks, noise prediction (DDPM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fbqat_hub.families.base import Family, call_arguments


class PixArtSigma(Family):
    """PixArtSigmaPipeline with PixArtTransformer2DModel."""

    name: ClassVar[str] = "pixart-sigma"
    pipeline_class: ClassVar[str] = "PixArtSigmaPipeline"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn1.*", "transformer_blocks.*.attn2.*"),
        "feed_forward": ("transformer_blocks.*.ff.*",),
    }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length", "clean_caption"))
        embeds, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def native_size(self, pipeline: Any) -> dict[str, Any]:
        side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        return {"height": side, "width": side, "use_resolution_binning": False}

    def noisy(
        self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor, *, few_step: bool = True
    ) -> tuple[Tensor, Tensor]:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t the product of 1 - beta up to t (DDPM); t uniform."""
        products = scheduler.alphas_cumprod
        timestep = (progress * len(products)).long()
        share = products[timestep].to(latents)[:, None, None, None]
        return share.sqrt() * latents + (1 - share).sqrt() * noise, timestep

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The noise."""
        return noise

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden_states": noisy, "timestep": timestep, **conditioning}

    def prediction(self, output: Tensor) -> Tensor:
        """The noise; the second half of the channels is the learned variance, which no sampler here uses."""
        return output.chunk(2, dim=1)[0]
