"""What quantizing needs to know of a model architecture."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class Family(ABC):
    """One architecture. A new family is one subclass in one file and one recipe.

    Attributes:
        name: as in recipes and results.
        pipeline_class: name of the diffusers pipeline class.
        size_multiple: sides of pictures are multiples of it: the autoencoder's factor times the patch's side.
        layer_groups: what can be trained alone -> fnmatch patterns of module names.
        activation_overrides: pattern -> activation settings that differ by default (the last layer runs W4A16 on the
            device, arXiv 2510.14823 section 4.3).
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    size_multiple: ClassVar[int] = 16
    layer_groups: ClassVar[dict[str, tuple[str, ...]]]
    activation_overrides: ClassVar[dict[str, dict[str, Any]]] = {"proj_out": {"bits": 16}}

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Scaled latents [N, C, H/f, W/f] of pictures in [-1, 1], [N, 3, H, W]: the mean of an ``AutoencoderKL``."""
        config = pipeline.vae.config
        pixels = pixels.to(pipeline.vae.device, pipeline.vae.dtype)
        return (pipeline.vae.encode(pixels).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Conditioning of prompts, every tensor [N, ...], as the pipeline call computes it.

        Args:
            generation: arguments of the pipeline call; what it leaves out has the call's own default.
        """

    @abstractmethod
    def native_size(self, pipeline: Any) -> dict[str, Any]:
        """Arguments of the pipeline call that draw at the size the denoiser was trained for."""

    def noisy(
        self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor, *, few_step: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Noisy latents and the denoiser's timesteps; by default those of flow matching, the time logit-normal.

        Args:
            latents, noise: [N, C, H, W].
            progress: [N] uniform in (0, 1), turned into a timestep by the family's noise schedule.
            few_step: a model that samples in few steps gets the times of those steps only.
        """
        t = logit_normal(progress)
        shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
        sigma = shift * t / (1 + (shift - 1) * t)
        return torch.lerp(latents, noise, sigma[:, None, None, None]), 1000 * sigma

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What the denoiser of a perfect model predicts; by default the velocity of flow matching, noise - latents."""
        return noise - latents

    def error_weight(self, scheduler: Any, timestep: Tensor) -> Tensor | None:
        """How much the sampler makes of a squared error at these timesteps, mean 1 over all of training: fp32 [N].

        None, the default, where all count alike.
        """
        return None

    @abstractmethod
    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser's forward."""

    def prediction(self, output: Tensor) -> Tensor:
        """The part of the denoiser's output that the sampler uses; by default all of it."""
        return output


def call_arguments(pipeline: Any, generation: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``names`` of ``generation``, with the pipeline call's own defaults where it leaves them out."""
    defaults = inspect.signature(type(pipeline).__call__).parameters
    return {name: generation.get(name, defaults[name].default) for name in names}


def logit_normal(progress: Tensor) -> Tensor:
    """Map uniform (0, 1) to a logit-normal sample, the timestep density of flow-matching models."""
    return torch.sigmoid(torch.special.ndtri(progress))
