"""Z-Image-Turbo: one stream of picture and text behind two refiners, a text of any length, eight steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fbqat_hub.families.base import Family, call_arguments

_BASE_SHIFT = 6.0


class ZImage(Family):
    """ZImagePipeline with ZImageTransformer2DModel, distilled into eight steps without guidance.

    The denoiser takes lists, a picture [C, 1, H, W] and a text [tokens, D] each, and predicts x_0 - noise. Conditioning
    is padded to the call's ``max_sequence_length`` and has a mask beside it, so that texts can be kept in one tensor.
    """

    name: ClassVar[str] = "z-image"
    title: ClassVar[str] = "Z-Image-Turbo"
    pipeline_class: ClassVar[str] = "ZImagePipeline"
    denoiser_class: ClassVar[str] = "ZImageTransformer2DModel"
    layer_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "all": ("*",),
        "blocks": ("layers.*", "noise_refiner.*", "context_refiner.*"),
        "attention": ("*.attention.*",),
        "feed_forward": ("*.feed_forward.*",),
    }
    activation_overrides: ClassVar[dict[str, dict[str, Any]]] = {"all_final_layer.*.linear": {"bits": 16}}
    a16_layers: ClassVar[tuple[str, ...]] = ("all_final_layer.*", "t_embedder.*", "*.adaLN_modulation.*")
    latents_input: ClassVar[str] = "x"
    timestep_input: ClassVar[str] = "t"
    even_sigmas: ClassVar[bool] = True
    stacks: ClassVar[tuple[str, ...]] = ("noise_refiner", "context_refiner", "layers")
    takes_tensors: ClassVar[bool] = False
    tiny: ClassVar[str | None] = "z-image-tiny"
    without_graph: ClassVar[str] = "its denoiser takes lists of pictures and texts of any length, a graph has one size"

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        arguments = call_arguments(pipeline, generation, ("max_sequence_length",))
        texts, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        longest = arguments["max_sequence_length"]
        padded = pad_sequence([*texts, texts[0].new_zeros(longest, texts[0].shape[1])], batch_first=True)[:-1]
        counts = torch.tensor([len(text) for text in texts], device=padded.device)
        mask = torch.arange(longest, device=padded.device) < counts[:, None]
        return {"encoder_hidden_states": padded, "encoder_attention_mask": mask}

    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        tokens = self.text_tokens(generation)
        return {"encoder_hidden_states": (tokens, config["cap_feat_dim"]), "encoder_attention_mask": (tokens,)}

    def own_call(self, pipeline: Any) -> dict[str, Any]:
        """Eight steps without guidance of the Turbo; Z-Image itself, whose scheduler shifts by 6 where the Turbo's
        shifts by 3, has the call's own defaults."""
        base = (pipeline.scheduler.config.get("shift") or 0) >= _BASE_SHIFT
        return {**super().own_call(pipeline), **({} if base else {"num_inference_steps": 8, "guidance_scale": 0.0})}

    def latent_side(self, config: Mapping[str, Any]) -> int:
        """128: the call's own size is 1024 pixels, and the denoiser's config says none."""
        return 128

    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        texts = conditioning["encoder_hidden_states"]
        mask = conditioning.get("encoder_attention_mask", torch.ones(texts.shape[:2], device=texts.device)).bool()
        return {
            "x": list(noisy.unsqueeze(2).unbind()),
            "t": (1000 - timestep) / 1000,
            "cap_feats": [text[seen] for text, seen in zip(texts, mask, strict=True)],
        }

    def prediction(self, output: Any) -> Tensor:
        """The velocity noise - x_0 of all pictures: the other way round than the denoiser's."""
        return -torch.stack(output).squeeze(2)
