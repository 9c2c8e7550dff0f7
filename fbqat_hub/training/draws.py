"""Denoiser inputs, drawn from a cached split: what is random comes from a key, never from what ran before.

Of pictures they are noised latents. Of prompts alone they are states of the teacher's sampler (`cache.SampledSplit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.families import Family, moved
from fbqat_hub.training.cache import CachedSplit, SampledSplit
from fbqat_hub.training.seeding import generator

# Arguments of the denoiser's forward, and what a perfect model predicts of them (``Family.target``).
Pair = tuple[dict[str, Any], Tensor]


class Draws:
    """Denoiser inputs drawn from a cached split, reproducibly.

    Args:
        family: of the denoiser.
        scheduler: of the pipeline.
        generation: arguments of the pipeline call; how many steps they sample in (`Family.noisy`).
        seed: of training and calibration; held-out draws are the same for every seed.
        device: where the inputs are put.
    """

    def __init__(
        self,
        family: Family,
        scheduler: Any,
        generation: Mapping[str, Any],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.family, self.scheduler, self.seed, self.device = family, scheduler, seed, device
        self._steps = family.sampler_steps(generation)

    def training(self, split: CachedSplit, step: int, batch_size: int, part: slice = slice(None)) -> dict[str, Any]:
        """The batch of an optimizer step, or the samples ``part`` of it."""
        indices, random = self._of_step(split, step, batch_size)
        return self._inputs(split, indices, [random], part)

    def training_pair(self, split: CachedSplit, step: int, batch_size: int) -> Pair:
        """As ``training``, of pictures, with what a perfect model predicts."""
        indices, random = self._of_step(split, step, batch_size)
        return self._pair(split, indices, [random])

    def calibration(self, split: CachedSplit, samples: int) -> Iterator[dict[str, Any]]:
        """Random samples for static activation ranges, one at a time."""
        for index in range(samples):
            random = generator(self.seed, "calibration", index)
            yield self._inputs(split, torch.randint(len(split), (1,), generator=random), [random])

    def held_out(self, split: CachedSplit, draws: int, batch_size: int) -> Iterator[dict[str, Any]]:
        """Every sample of a split with ``draws`` different noises and timesteps, in the order of the draws.

        A sample's noise and timestep depend on its index and the number of the draw only: they are the same for every
        method, seed and batch size.
        """
        for indices, streams in self._of_held_out(split, draws, batch_size):
            yield self._inputs(split, indices, streams)

    def held_out_pairs(self, split: CachedSplit, draws: int, batch_size: int) -> Iterator[Pair]:
        """As ``held_out``, of pictures, with what a perfect model predicts."""
        for indices, streams in self._of_held_out(split, draws, batch_size):
            yield self._pair(split, indices, streams)

    def predict(self, denoiser: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What the sampler would take from the denoiser."""
        return self.family.predict(denoiser, inputs)

    def times(self, inputs: dict[str, Any]) -> Tensor:
        """The timesteps of a batch, [N], as the denoiser is given them."""
        times: Tensor = inputs[self.family.timestep_input]
        return times

    def error_weight(self, inputs: dict[str, Any]) -> Tensor | None:
        """``Family.error_weight`` of a batch, [N]."""
        return self.family.error_weight(self.scheduler, self.times(inputs))

    def _of_step(self, split: CachedSplit, step: int, batch_size: int) -> tuple[Tensor, torch.Generator]:
        random = generator(self.seed, "train", step, 0)
        return torch.randint(len(split), (batch_size,), generator=random), random

    def _of_held_out(
        self, split: CachedSplit, draws: int, batch_size: int
    ) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
        for draw in range(draws):
            for first in range(0, len(split), batch_size):
                indices = torch.arange(first, min(first + batch_size, len(split)))
                yield indices, [generator("held-out", draw, index) for index in indices.tolist()]

    def _inputs(
        self, split: CachedSplit, indices: Tensor, streams: Sequence[torch.Generator], part: slice = slice(None)
    ) -> dict[str, Any]:
        """Of the samples ``indices``, with one stream of random numbers for all of them, or one for each.

        Of a part of them it is what it is of all.
        """
        if not isinstance(split, SampledSplit):
            return self._pair(split, indices, streams, part)[0]
        noisy, timestep, conditioning = split.states(indices[part], _uniform(len(indices), streams)[part])
        return moved(self.family.denoiser_inputs(noisy, timestep, conditioning), self.device)

    def _pair(
        self, split: CachedSplit, indices: Tensor, streams: Sequence[torch.Generator], part: slice = slice(None)
    ) -> Pair:
        """As ``_inputs``, of pictures."""
        latents, conditioning = split.batch(indices[part])
        conditioning |= self.family.picture_conditioning(latents)
        shape = (len(indices) // len(streams), *latents.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=random) for random in streams])[part]
        uniform = _uniform(len(indices), streams)[part]
        noisy, timestep = self.family.noisy(self.scheduler, latents.float(), noise, uniform, self._steps)
        inputs = moved(self.family.denoiser_inputs(noisy, timestep, conditioning), self.device)
        return inputs, self.family.target(latents.float(), noise).to(self.device)


def _uniform(count: int, streams: Sequence[torch.Generator]) -> Tensor:
    """[count] from 0 to 1, as many from each stream."""
    drawn = [torch.rand(count // len(streams), generator=random) for random in streams]
    return torch.cat(drawn).clamp(1e-4, 1 - 1e-4)
