"""Where the teacher's own sampler asks its denoiser, on the way to pictures of prompts: training without pictures.

A student that is trained at these latents and timesteps is trained where it will be used, and needs no pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.families import Family, component_configs
from fbqat_hub.generation import of_several
from fbqat_hub.training.seeding import generator
from fbqat_hub.training.trajectories import kept_steps

# Of the sampler, that are kept of a picture: one of each of so many equal parts.
STEPS = 4


@dataclass
class _Seen:
    """What a sampler did: its (timestep, latents) before each step, and for how many pictures it asked the denoiser."""

    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    asked: int = 0


@torch.no_grad()
def sampled_states(
    pipeline: Any,
    family: Family,
    pictures: Sequence[tuple[str, int]],
    size: tuple[int, int],
    generation: Mapping[str, Any],
) -> tuple[dict[str, Tensor], bool]:
    """Latents of some of the sampler's steps, of all pictures at once.

    Args:
        pipeline: the teacher.
        pictures: the prompt of each, and its number among those of the prompt; noise and steps depend on these alone.
        size: (height, width) of the pictures.
        generation: arguments of the pipeline call.

    Returns:
        "latents" [N, K, C, H, W], as ``Family.noisy`` gives them, and "timesteps" [N, K], on the CPU; K is `STEPS`, or
        all steps of a sampler that takes fewer. And whether the sampler also asks without the prompt.

    Raises:
        ValueError: latents that are not finite; the first prompt is named.
    """
    _, height, width = family.latent_shape(component_configs(pipeline), size)
    noise = [generator("sampled picture", *each) for each in pictures]
    pipeline.set_progress_bar_config(disable=True)
    with _watched(pipeline, family) as seen:
        call = of_several(generation, len(pictures))
        pipeline(prompt=[prompt for prompt, _ in pictures], generator=noise, output_type="latent", **call)
    latents = torch.stack([family.noisy_of_sampler(pipeline.scheduler, value) for _, value in seen.steps], dim=1)
    for (prompt, _), own in zip(pictures, latents, strict=True):
        if not own.isfinite().all():
            raise ValueError(
                f"the teacher's latents for {prompt!r:.80} are not finite: it is broken, or its numbers overflow in "
                f"{own.dtype}. Nothing was kept of them."
            )
    shape = latents.shape[:2]
    latents = family.unpack_latents(latents.flatten(0, 1), height, width).unflatten(0, shape)
    times = torch.stack([time.expand(shape[0]) for time, _ in seen.steps], dim=1)
    kept = [kept_steps(shape[1], STEPS, generator("sampled steps", *each)) for each in pictures]
    rows = torch.arange(len(pictures))[:, None]
    found = {"latents": latents.cpu()[rows, torch.tensor(kept)], "timesteps": times.cpu()[rows, torch.tensor(kept)]}
    return found, seen.asked > len(pictures) * len(seen.steps)


@contextmanager
def _watched(pipeline: Any, family: Family) -> Iterator[_Seen]:
    """Within, what the pipeline's sampler does is kept."""
    seen, step = _Seen(), pipeline.scheduler.step

    @functools.wraps(step)
    def watched(output: Tensor, timestep: Tensor, sample: Tensor, *rest: Any, **named: Any) -> Any:
        seen.steps.append((timestep, sample))
        return step(output, timestep, sample, *rest, **named)

    def count(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.asked += len(positional[0] if positional else named[family.latents_input])

    hook = pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
    pipeline.scheduler.step = watched
    try:
        yield seen
    finally:
        del pipeline.scheduler.step
        hook.remove()
