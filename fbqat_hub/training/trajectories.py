"""What the teacher's own sampler asks of the denoiser: the draws of the judge, and of a choice of widths by prompts.

A student is judged by how far its predictions are from the teacher's where it will be used: at the latents that the
teacher's sampler passes through, at the sampler's own timesteps, with and without the prompt where it guides. Of each
picture that the teacher makes, some steps are kept. The noise of a picture and the steps that are kept depend on its
caption and its number only: the draws are the same for every method, seed and recipe. ``VERSION`` counts their changes.
They are made once and kept on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fbqat_hub.families import Family
from fbqat_hub.files import whole
from fbqat_hub.progress import each
from fbqat_hub.training.seeding import generator

VERSION = 1
# Pictures made at a time. Not the caller's choice: the last bits of a float depend on it.
_BATCH = 64
# Beside the conditioning, what the denoiser gets for each draw.
_OF_DRAW = ("hidden_states", "timestep")
_INDICES = ("rows", "captions", "steps")


@dataclass(frozen=True)
class Trajectories:
    """Draws of the sampler, N of them.

    Attributes:
        latents: "hidden_states" and "timestep", [N, ...].
        conditioning: of each caption and, where the sampler guides, of no prompt behind them: [captions (+ 1), ...].
        shared: tensors that are the same for all draws and have no batch, e.g. positions.
        rows: int64 [N], the conditioning of each draw.
        captions: int64 [N], the caption whose picture it belongs to.
        steps: int64 [N], of the sampler.
    """

    latents: dict[str, Tensor]
    conditioning: dict[str, Tensor]
    shared: dict[str, Tensor]
    rows: Tensor
    captions: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
        """Keyword arguments of the denoiser for all draws, in order."""
        for part in torch.arange(len(self)).split(size):
            inputs = {name: value[part] for name, value in self.latents.items()}
            inputs |= {name: value[self.rows[part]] for name, value in self.conditioning.items()} | self.shared
            yield {name: value.to(device) for name, value in inputs.items()}

    def by_caption(self, values: Sequence[float]) -> list[float]:
        """The mean of each caption's draws: what is independent of each other, for an interval."""
        means = torch.zeros(int(self.captions.max()) + 1, dtype=torch.float64)
        means.index_add_(0, self.captions, torch.tensor(values, dtype=torch.float64))
        found: list[float] = (means / self.captions.bincount()).tolist()
        return found


@torch.no_grad()
def predictions(
    model: nn.Module,
    draws: Trajectories,
    family: Family,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What a denoiser predicts of each draw: fp32 [N, ...], on the CPU."""
    return torch.cat([family.predict(model, inputs).float().cpu() for inputs in draws.batches(batch_size, device)])


def trajectory_loss(student: Tensor, teacher: Tensor) -> list[float]:
    """Mean squared distance of two models' ``predictions``, for each draw."""
    losses: list[float] = (student - teacher).square().flatten(1).mean(1).tolist()
    return losses


def trajectories(
    pipeline: Any,
    family: Family,
    captions: Sequence[str],
    generation: Mapping[str, Any],
    path: Path,
    *,
    pictures: int = 3,
    steps: int = 4,
    progress: bool = True,
) -> Trajectories:
    """Draws of the teacher's sampler, from ``path`` or made now.

    Args:
        pipeline: the teacher.
        captions: different from each other; for a judge, none of them trained on.
        generation: arguments of the pipeline call.
        path: of the file; its name should tell what these arguments are.
        pictures: of each caption, each from a noise of its own.
        steps: of each picture, one in each of so many equal parts of the sampler's steps (all, if it has fewer). With
            guidance a step is two draws, without prompt and with it.

    Raises:
        ValueError: captions that are not different, a count below 1, or a denoiser that is given more than tensors.
    """
    if not family.takes_tensors:
        raise ValueError(f"the draws of a {family.title}'s sampler cannot be kept: its denoiser takes lists and sizes.")
    if len(set(captions)) != len(captions) or not captions:
        raise ValueError(f"{len(captions)} captions of which {len(set(captions))} are different; give each once.")
    if min(pictures, steps) < 1:
        raise ValueError(f"pictures is {pictures} and steps {steps}; both must be at least 1.")
    if not path.exists():
        pipeline.set_progress_bar_config(disable=True)
        tensors = _made(pipeline, family, list(captions), generation, pictures, steps, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            save_file(tensors, partial)
    return _read(path)


def _made(
    pipeline: Any,
    family: Family,
    captions: list[str],
    generation: Mapping[str, Any],
    pictures: int,
    steps: int,
    progress: bool,
) -> dict[str, Tensor]:
    """The tensors of the file: what each draw has of its own, "conditioning.*" and "shared.*"."""
    names = family.encode_prompts(pipeline, captions[:1], generation).keys()
    wanted = [(caption, number) for caption in range(len(captions)) for number in range(pictures)]
    draws: dict[str, list[Tensor]] = {}
    conditioning: dict[str, dict[int, Tensor]] = {name: {} for name in names}
    inputs: dict[str, Tensor] = {}
    starts = range(0, len(wanted), _BATCH)
    for first in each(starts, "trajectories", "batch", shown=progress):
        batch = wanted[first : first + _BATCH]
        keys = [(VERSION, captions[caption], number) for caption, number in batch]
        noise = [generator("trajectory noise", *key) for key in keys]
        calls: list[dict[str, Tensor]] = []
        with _recorded(pipeline.transformer, calls):
            pipeline(
                prompt=[captions[caption] for caption, _ in batch], generator=noise, output_type="latent", **generation
            )
        inputs = calls[0]
        halves = len(inputs["hidden_states"]) // len(batch)  # 2 with guidance, and those without prompt come first
        for name, rows in conditioning.items():
            rows |= {caption: inputs[name][place - len(batch)] for place, (caption, _) in enumerate(batch)}
            if halves == 2:
                rows[len(captions)] = inputs[name][0]
        for place, (key, (caption, _)) in enumerate(zip(keys, batch, strict=True)):
            for step in kept_steps(len(calls), steps, generator("trajectory steps", *key)):
                for half in range(halves):
                    row = caption if half == halves - 1 else len(captions)
                    own = {name: calls[step][name][half * len(batch) + place] for name in _OF_DRAW}
                    own |= {name: torch.tensor(n) for name, n in zip(_INDICES, (row, caption, step), strict=True)}
                    for name, value in own.items():
                        draws.setdefault(name, []).append(value.cpu())
    tensors = {name: torch.stack(values) for name, values in draws.items()}
    for name, by_row in conditioning.items():
        tensors[f"conditioning.{name}"] = torch.stack([by_row[row] for row in sorted(by_row)]).cpu()
    shared = {name: value for name, value in inputs.items() if name not in (*_OF_DRAW, *names)}
    return tensors | {f"shared.{name}": value.cpu().contiguous() for name, value in shared.items()}


def kept_steps(count: int, steps: int, random: torch.Generator) -> list[int]:
    """One of each of ``steps`` equal parts of ``count`` steps.

    >>> kept_steps(3, 4, torch.Generator())
    [0, 1, 2]
    """
    parts = min(count, steps)
    shares = (torch.arange(parts) + torch.rand(parts, generator=random)) / parts
    return [int(share * count) for share in shares.double()]


@contextmanager
def _recorded(denoiser: nn.Module, calls: list[dict[str, Tensor]]) -> Iterator[None]:
    """Within, the tensors that the denoiser is called with are added to ``calls``, by name."""

    def record(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = {**dict(zip(("hidden_states",), positional, strict=False)), **named}
        calls.append({name: value.clone() for name, value in given.items() if isinstance(value, Tensor)})

    hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _read(path: Path) -> Trajectories:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return Trajectories(
        latents={name: tensors[name] for name in _OF_DRAW},
        conditioning=part("conditioning."),
        shared=part("shared."),
        **{name: tensors[name] for name in _INDICES},
    )
