"""FLUX.2-klein: double blocks and single blocks with one fused projection, shared modulation, Qwen3, four steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fbqat_hub.families.attention import ExplicitParallelAttention, ExplicitRotaryAttention
from fbqat_hub.families.base import Family, call_arguments
from fbqat_hub.families.graph import GraphWrapper, Item, TwinModule, float_twin, host_inputs, with_constants


class Flux2Klein(Family):
    """Flux2KleinPipeline with Flux2Transformer2DModel, distilled into four steps without guidance.

    Latents here are squares of 2 x 2 of the autoencoder's in one, [N, 4 C, H/2, W/2], scaled by its batch norm; each is
    a token of the denoiser.
    """

    name: ClassVar[str] = "flux2-klein"
    title: ClassVar[str] = "FLUX.2-klein"
    pipeline_class: ClassVar[str] = "Flux2KleinPipeline"
    denoiser_class: ClassVar[str] = "Flux2Transformer2DModel"
    autoencoder_class: ClassVar[str] = "AutoencoderKLFlux2"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*", "single_transformer_blocks.*"),
        # a single block's two layers are of its attention and its feed-forward at once
        "attention": ("transformer_blocks.*.attn.*", "single_transformer_blocks.*.attn.*"),
        "feed_forward": ("transformer_blocks.*.ff.*", "transformer_blocks.*.ff_context.*"),
    }
    a16_layers: ClassVar[tuple[str, ...]] = (
        "proj_out",
        "time_guidance_embed.*",
        "double_stream_modulation_*.linear",
        "single_stream_modulation.linear",
        "norm_out.linear",
    )
    even_sigmas: ClassVar[bool] = True
    patch_side: ClassVar[int] = 1
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    constant_inputs: ClassVar[tuple[str, ...]] = ("txt_ids", "img_ids")
    options_without_graph: ClassVar[tuple[str, ...]] = ("guidance_embeds",)
    without_bundle: ClassVar[str] = "its decoder undoes a batch norm of packed latents, which the runner does not"

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        latents: Tensor = pipeline._encode_vae_image(pixels.to(pipeline.vae.device, pipeline.vae.dtype), generator=None)
        return latents

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length", "text_encoder_out_layers"))
        return {"encoder_hidden_states": pipeline.encode_prompt(list(prompts), **arguments)[0]}

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (self.text_tokens(generation), config["joint_attention_dim"])}

    def latent_shape(self, configs: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> tuple[int, int, int]:
        """2 x 2 latents of the autoencoder are one of the denoiser's."""
        channels, height, width = super().latent_shape(configs, size)
        return channels, height // 2, width // 2

    def latent_side(self, config: Mapping[str, Any]) -> int:
        """128, the pipeline's own: positions are rotary, and the denoiser's config says no size."""
        return 128

    def own_call(self, pipeline: Any) -> dict[str, Any]:
        """Four steps without guidance of a distilled one; the base models have the call's own defaults."""
        few = {"num_inference_steps": 4, "guidance_scale": 1.0} if pipeline.config.is_distilled else {}
        return {**super().own_call(pipeline), **few}

    def dynamic_shift(self, scheduler: Any, tokens: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps or self.sampler_steps({})))

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from diffusers import Flux2KleinPipeline

        text = conditioning["encoder_hidden_states"]
        return {
            "hidden_states": self.pack_latents(noisy),
            "timestep": timestep / 1000,
            "img_ids": Flux2KleinPipeline._prepare_latent_ids(noisy).to(noisy.device),
            "txt_ids": Flux2KleinPipeline._prepare_text_ids(text).to(noisy.device),
            **conditioning,
        }

    def pack_latents(self, latents: Tensor) -> Tensor:
        """[N, 4 C, H/2, W/2] as tokens [N, H/2 * W/2, 4 C]."""
        from diffusers import Flux2KleinPipeline

        tokens: Tensor = Flux2KleinPipeline._pack_latents(latents)
        return tokens

    def unpack_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (height, width))

    def graph(self, denoiser: Any, example: Item) -> GraphWrapper:
        self.check_graph(denoiser)
        twin = float_twin(denoiser)
        for block in twin.transformer_blocks:
            block.attn.set_processor(ExplicitRotaryAttention())
        for block in twin.single_transformer_blocks:
            block.attn.set_processor(ExplicitParallelAttention())
        with torch.no_grad():
            rotary = twin.pos_embed(torch.cat([example[ids][0] for ids in self.constant_inputs]))
        names = ("hidden_states", "encoder_hidden_states")
        made = host_inputs(twin.time_guidance_embed.time_proj, names, time_scale=1000.0)
        inputs = with_constants(made, example, self.constant_inputs)
        return GraphWrapper(module=_Forward(twin, self.blocks(twin), rotary), host_inputs=inputs)


class _Forward(TwinModule):
    """FLUX.2's forward with the sin/cos of the timestep given and the rotary positions as constants."""

    def __init__(self, twin: Any, blocks: Sequence[str], rotary: tuple[Tensor, Tensor]) -> None:
        super().__init__(twin, blocks)
        self.register_buffer("cosine", rotary[0])
        self.register_buffer("sine", rotary[1])

    def compute(self, *inputs: Tensor) -> Tensor:
        hidden_states, encoder_hidden_states, timestep_embedding = inputs
        twin: Any = self.twin
        rotary = (self.cosine, self.sine)
        temb = twin.time_guidance_embed.timestep_embedder(timestep_embedding)
        of_picture, of_text = twin.double_stream_modulation_img(temb), twin.double_stream_modulation_txt(temb)
        picture, text = twin.x_embedder(hidden_states), twin.context_embedder(encoder_hidden_states)
        for block in twin.transformer_blocks:
            text, picture = block(picture, text, of_picture, of_text, image_rotary_emb=rotary)
        joined, modulation = torch.cat([text, picture], dim=1), twin.single_stream_modulation(temb)
        for block in twin.single_transformer_blocks:
            joined = block(joined, None, modulation, image_rotary_emb=rotary)
        output: Tensor = twin.proj_out(twin.norm_out(joined[:, text.shape[1] :], temb))
        return output
