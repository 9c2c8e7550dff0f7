"""What quantizing needs to know of a model architecture."""

from __future__ import annotations

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
        layer_groups: what can be trained alone -> fnmatch patterns of module names.
        activation_overrides: pattern -> activation settings that differ by default (the last layer runs W4A16 on the
            device, arXiv 2510.14823 section 4.3).
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    layer_groups: ClassVar[dict[str, tuple[str, ...]]]
    activation_overrides: ClassVar[dict[str, dict[str, Any]]]

    @abstractmethod
    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Scaled latents of pictures in [-1, 1], [N, 3, H, W]."""

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Conditioning of prompts, every tensor [N, ...], as the pipeline call computes it.

        Args:
            generation: arguments of the pipeline call; what it leaves out has the call's own default.
        """

    @abstractmethod
    def native_size(self, pipeline: Any) -> dict[str, Any]:
        """Arguments of the pipeline call that draw at the size the denoiser was trained for."""

    @abstractmethod
    def noisy(self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the denoiser's timesteps.

        Args:
            latents, noise: [N, C, H, W].
            progress: [N] uniform in (0, 1), turned into a timestep by the family's noise schedule.
        """

    @abstractmethod
    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser's forward."""


def logit_normal(progress: Tensor) -> Tensor:
    """Map uniform (0, 1) to a logit-normal sample, the timestep density of flow-matching models."""
    return torch.sigmoid(torch.special.ndtri(progress))
