"""FLUX.1 schnell, dev and Kontext-dev: double- and single-stream blocks with rotary positions, CLIP and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fbqat_hub.families.attention import ExplicitRotaryAttention
from fbqat_hub.families.base import Family, Original, call_arguments
from fbqat_hub.families.graph import GraphWrapper, Item, TwinModule, float_twin, host_inputs, with_constants

#: The conditioning that is a reference picture's latents, [N, C, H, W].
_REFERENCE = "reference_latents"
#: Module of a block in diffusers -> in the original checkpoint.
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}


class Flux(Family):
    """FluxPipeline with FluxTransformer2DModel: schnell, and dev, which is told the guidance scale.

    Schnell samples in four steps; dev, whose scheduler shifts its times by the picture's size, does not. The denoiser
    takes tokens: 2 x 2 latents packed into one, [N, H/2 * W/2, 4 C].
    """

    name: ClassVar[str] = "flux"
    title: ClassVar[str] = "FLUX.1-schnell"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    denoiser_class: ClassVar[str] = "FluxTransformer2DModel"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*", "single_transformer_blocks.*"),
        "attention": ("transformer_blocks.*.attn.*", "single_transformer_blocks.*.attn.*"),
        "feed_forward": (
            "transformer_blocks.*.ff.*",
            "transformer_blocks.*.ff_context.*",
            "single_transformer_blocks.*.proj_mlp",
            "single_transformer_blocks.*.proj_out",
        ),
    }
    a16_layers: ClassVar[tuple[str, ...]] = (
        "proj_out",
        "time_text_embed.*",
        "norm_out.linear",
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
    )
    most_text_tokens: ClassVar[int] = 512
    even_sigmas: ClassVar[bool] = True
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    constant_inputs: ClassVar[tuple[str, ...]] = ("txt_ids", "img_ids")
    tiny: ClassVar[str | None] = "flux-schnell-tiny"

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._encoded(pipeline, list(prompts), list(prompts), generation)

    def encode_no_prompt(self, pipeline: Any, generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """T5 may have a negative prompt of its own."""
        first = generation.get("negative_prompt") or ""
        return self._encoded(pipeline, [first], [generation.get("negative_prompt_2") or first], generation)

    def _encoded(
        self, pipeline: Any, of_clip: list[str], of_t5: list[str], generation: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length",))
        embeds, pooled, _ = pipeline.encode_prompt(of_clip, of_t5, **arguments)
        conditioning = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if pipeline.transformer.config.guidance_embeds:
            scale = call_arguments(pipeline, generation, ("guidance_scale",))["guidance_scale"]
            conditioning["guidance"] = torch.full((len(embeds),), float(scale), device=embeds.device)
        return conditioning

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        tokens, pooled = self.text_tokens(generation), config["pooled_projection_dim"]
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (tokens, config["joint_attention_dim"]),
            "pooled_projections": (pooled,),
        }
        return shapes | ({"guidance": ()} if config["guidance_embeds"] else {})

    def latent_shape(self, configs: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> tuple[int, int, int]:
        channels, height, width = super().latent_shape(configs, size)
        return channels // 4, height, width

    def own_call(self, pipeline: Any) -> dict[str, Any]:
        """Four steps without guidance of FLUX.1-schnell, whose scheduler does not shift by the picture's size."""
        dev = pipeline.scheduler.config.get("use_dynamic_shifting")
        return {**super().own_call(pipeline), **({} if dev else {"num_inference_steps": 4, "guidance_scale": 0.0})}

    def latent_side(self, config: Mapping[str, Any]) -> int:
        """128, FluxPipeline's own: positions are rotary, and the denoiser's config says no size."""
        return 128

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from diffusers import FluxPipeline

        height, width = noisy.shape[-2:]
        ids = FluxPipeline._prepare_latent_image_ids(len(noisy), height // 2, width // 2, noisy.device, torch.float32)
        return {
            "hidden_states": self.pack_latents(noisy),
            "timestep": timestep / 1000,
            "img_ids": ids,
            "txt_ids": torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3, device=noisy.device),
            **conditioning,
        }

    def pack_latents(self, latents: Tensor) -> Tensor:
        """[N, C, H, W] as tokens [N, H/2 * W/2, 4 C], each channel's 2 x 2 square in reading order."""
        from diffusers import FluxPipeline

        return FluxPipeline._pack_latents(latents, *latents.shape)

    def unpack_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        from diffusers import FluxPipeline

        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor=1)

    def original_modules(self, config: Mapping[str, Any]) -> dict[str, Original]:
        """Those of Black Forest Labs' checkpoints."""
        found = {"x_embedder": Original("img_in"), "context_embedder": Original("txt_in")}
        embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in"}
        for name, original in (
            embedders | ({"guidance_embedder": "guidance_in"} if config["guidance_embeds"] else {})
        ).items():
            for linear, layer in (("linear_1", "in_layer"), ("linear_2", "out_layer")):
                found[f"time_text_embed.{name}.{linear}"] = Original(f"{original}.{layer}")
        for stack, original_stack, modules, count in (
            ("transformer_blocks", "double_blocks", _DOUBLE, config["num_layers"]),
            ("single_transformer_blocks", "single_blocks", _SINGLE, config["num_single_layers"]),
        ):
            for index in range(count):
                for name, original in modules.items():
                    weight = "scale" if original.endswith("_norm") else "weight"
                    found[f"{stack}.{index}.{name}"] = Original(f"{original_stack}.{index}.{original}", weight=weight)
        found["norm_out.linear"] = Original("final_layer.adaLN_modulation.1", halves_swapped=True)
        return found | {"proj_out": Original("final_layer.linear")}

    def graph(self, denoiser: Any, example: Item) -> GraphWrapper:
        self.check_graph(denoiser)
        twin = float_twin(denoiser)
        twin.set_attn_processor(ExplicitRotaryAttention())
        with torch.no_grad():
            rotary = twin.pos_embed(torch.cat([example[ids] for ids in self.constant_inputs]))
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
        told = denoiser.config.guidance_embeds
        time_proj = twin.time_text_embed.time_proj
        made = host_inputs(time_proj, names, time_scale=1000.0, guidance_proj=time_proj if told else None)
        inputs = with_constants(made, example, self.constant_inputs)
        return GraphWrapper(module=_Forward(twin, self.blocks(twin), rotary), host_inputs=inputs)


class FluxKontext(Flux):
    """FluxKontextPipeline: FLUX.1-Kontext-dev, whose tokens of a reference picture follow those of the noisy one.

    Training takes each picture as its own reference, since a captioned data set has no pairs: the denoiser then sees
    tokens of a reference at their own positions, and the loss is over what it predicts for the noisy ones alone.
    """

    name: ClassVar[str] = "flux-kontext"
    title: ClassVar[str] = "FLUX.1-Kontext-dev"
    pipeline_class: ClassVar[str] = "FluxKontextPipeline"
    without_bundle: ClassVar[str] = "a bundle has no encoder of the reference picture"
    needs_pictures: ClassVar[str] = "it edits a reference picture"
    tiny: ClassVar[str | None] = None

    def picture_conditioning(self, latents: Tensor) -> dict[str, Tensor]:
        return {_REFERENCE: latents}

    def following(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """``max_area``, which the call scales every picture to."""
        height, width = call.get("height"), call.get("width")
        return {"max_area": height * width} if isinstance(height, int) and isinstance(width, int) else {}

    def native_size(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        size = super().native_size(configs)
        return {**size, **self.following(size)}

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest = {name: value for name, value in conditioning.items() if name != _REFERENCE}
        inputs = super().denoiser_inputs(noisy, timestep, rest)
        if _REFERENCE in conditioning:
            own = super().denoiser_inputs(conditioning[_REFERENCE], timestep, rest)
            own["img_ids"][:, 0] = 1  # the first axis tells the pictures apart
            for name, axis in (("hidden_states", 1), ("img_ids", 0)):
                inputs[name] = torch.cat([inputs[name], own[name]], dim=axis)
        return inputs

    def predict(self, denoiser: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """For the tokens of the noisy picture, without those of the reference."""
        predicted, picture = super().predict(denoiser, inputs), inputs["img_ids"][:, 0]
        if isinstance(picture, FakeTensor):  # of shapes alone: training's reference is as large as the noisy picture
            return predicted[:, : len(picture) // 2]
        return predicted[:, : int((picture == 0).sum())]


class _Forward(TwinModule):
    """FLUX's forward with the sin/cos of timestep and guidance scale given and the rotary positions as constants."""

    def __init__(self, twin: Any, blocks: Sequence[str], rotary: tuple[Tensor, Tensor]) -> None:
        super().__init__(twin, blocks)
        self.register_buffer("cosine", rotary[0])
        self.register_buffer("sine", rotary[1])

    def compute(self, *inputs: Tensor) -> Tensor:
        hidden_states, encoder_hidden_states, pooled_projections, timestep_embedding, *guidance_embedding = inputs
        twin: Any = self.twin
        rotary = (self.cosine, self.sine)
        embed = twin.time_text_embed
        temb = embed.timestep_embedder(timestep_embedding)
        for embedding in guidance_embedding:  # one, or none
            temb = temb + embed.guidance_embedder(embedding)
        temb = temb + embed.text_embedder(pooled_projections)
        picture, text = twin.x_embedder(hidden_states), twin.context_embedder(encoder_hidden_states)
        for block in [*twin.transformer_blocks, *twin.single_transformer_blocks]:
            text, picture = block(hidden_states=picture, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        output: Tensor = twin.proj_out(twin.norm_out(picture, temb))
        return output
