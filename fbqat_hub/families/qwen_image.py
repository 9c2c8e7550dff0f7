"""Qwen-Image: blocks of two streams with rotary positions, Qwen2.5-VL, an autoencoder of video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fbqat_hub.families.base import Family, call_arguments


class QwenImage(Family):
    """QwenImagePipeline with QwenImageTransformer2DModel.

    The denoiser takes tokens, 2 x 2 latents each, and the pictures' sizes as numbers. A batch's texts are padded to its
    longest, and a mask is given only where there is padding, as the pipeline does.
    """

    name: ClassVar[str] = "qwen-image"
    title: ClassVar[str] = "Qwen-Image"
    pipeline_class: ClassVar[str] = "QwenImagePipeline"
    denoiser_class: ClassVar[str] = "QwenImageTransformer2DModel"
    autoencoder_class: ClassVar[str] = "AutoencoderKLQwenImage"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("transformer_blocks.*",),
        "attention": ("transformer_blocks.*.attn.*",),
        "feed_forward": ("transformer_blocks.*.img_mlp.*", "transformer_blocks.*.txt_mlp.*"),
    }
    even_sigmas: ClassVar[bool] = True
    a16_layers: ClassVar[tuple[str, ...]] = (
        "proj_out",
        "time_text_embed.*",
        "norm_out.linear",
        "transformer_blocks.*.img_mod.*",
        "transformer_blocks.*.txt_mod.*",
    )
    most_text_tokens: ClassVar[int] = 1024
    takes_tensors: ClassVar[bool] = False
    without_graph: ClassVar[str] = "the rotary positions of its two streams have no graph here"

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        config = pipeline.vae.config
        pixels = pixels.to(pipeline.vae.device, pipeline.vae.dtype)
        latents = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)  # a video of one frame
        mean, deviation = (
            torch.tensor(each).to(latents).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / deviation

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length",))
        embeds, mask = pipeline.encode_prompt(list(prompts), **arguments)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        lacking = arguments["max_sequence_length"] - embeds.shape[1]
        return {
            "encoder_hidden_states": F.pad(embeds, (0, 0, 0, lacking)),
            "encoder_hidden_states_mask": F.pad(mask, (0, lacking)),
        }

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        tokens = self.text_tokens(generation)
        shape = (tokens, config["joint_attention_dim"])
        return {"encoder_hidden_states": shape, "encoder_hidden_states_mask": (tokens,)}

    def latent_shape(self, configs: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> tuple[int, int, int]:
        factor = 2 ** len(configs["vae"]["temperal_downsample"])
        return configs["transformer"]["in_channels"] // 4, size[0] // factor, size[1] // factor

    def latent_side(self, config: Mapping[str, Any]) -> int:
        """128, the pipeline's own: positions are rotary, and the denoiser's config says no size."""
        return 128

    def native_size(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """As the pipeline counts: the autoencoder halves a picture as often as `temperal_downsample` has entries."""
        side = self.latent_side(configs["transformer"]) * 2 ** len(configs["vae"]["temperal_downsample"])
        return {"height": side, "width": side}

    def own_call(self, pipeline: Any) -> dict[str, Any]:
        """With a negative prompt of one space: without any the call does not guide, whatever its ``true_cfg_scale``."""
        return {**super().own_call(pipeline), "negative_prompt": " "}

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        texts = conditioning["encoder_hidden_states"]
        mask = conditioning.get("encoder_hidden_states_mask", torch.ones(texts.shape[:2], dtype=torch.long))
        longest = int(mask.sum(1).max())
        height, width = noisy.shape[-2:]
        return {
            "hidden_states": self.pack_latents(noisy),
            "timestep": timestep / 1000,
            "encoder_hidden_states": texts[:, :longest],
            "encoder_hidden_states_mask": None if mask[:, :longest].all() else mask[:, :longest],
            "img_shapes": [[(1, height // 2, width // 2)]] * len(noisy),
        }

    def pack_latents(self, latents: Tensor) -> Tensor:
        """[N, C, H, W] as tokens [N, H/2 * W/2, 4 C], each channel's 2 x 2 square in reading order."""
        from diffusers import QwenImagePipeline

        tokens: Tensor = QwenImagePipeline._pack_latents(latents, *latents.shape)
        return tokens

    def unpack_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        from diffusers import QwenImagePipeline

        unpacked: Tensor = QwenImagePipeline._unpack_latents(latents, height, width, vae_scale_factor=1)
        return unpacked.squeeze(2)
