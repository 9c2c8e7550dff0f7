"""Quick measurements of what a recipe has to choose from: bit widths, and layers to train.

Losses are measured on the validation split. Their uncertainties are standard errors over pictures; what another seed
would change is not in them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from fbqat_hub.evaluation.results import peak_rss_mib
from fbqat_hub.families import get_family
from fbqat_hub.progress import Progress, each
from fbqat_hub.quantization import FakeQuantizedLinear, named_layers, set_bit_width
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import distill
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.student import prepare_student

# A group of layers is advised if its loss is at most this share above that of training all.
TOLERANCE = 0.05
# What a loss is measured on: at most so many validation pictures, so many noises and timesteps of each.
PICTURES, DRAWS = 128, 2


class Estimate(NamedTuple):
    """A mean over pictures and its standard error, which is None for a single picture."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value a picture."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)


@dataclass(frozen=True)
class Probe:
    """What a short training of one group of layers came to.

    Attributes:
        trained_parameters: their number; ``share`` is it over all parameters of the student.
        losses: held-out distillation loss at the stored bit width, the mean of each picture.
        seconds_per_step: median.
        peak_mib: peak memory in MiB: of the GPU during the probe, else of the process so far; None on Windows.
    """

    trained_parameters: int
    share: float
    losses: list[float]
    seconds_per_step: float
    peak_mib: float | None


def widths_to(bits: float) -> list[float]:
    """The bit widths of the curve: every half from 8 to 6, then every quarter down to ``bits``.

    >>> widths_to(5)
    [8.0, 7.5, 7.0, 6.5, 6.0, 5.75, 5.5, 5.25, 5.0]
    """
    quarters = [quarter / 4 for quarter in range(32, 0, -1) if quarter % 2 == 0 or quarter < 24]
    return [*(width for width in quarters if width > bits), float(bits)]


def loss_against_width(
    student: nn.Module,
    teacher: nn.Module,
    split: CachedSplit,
    draws: Draws,
    widths: Iterable[float],
    *,
    progress: bool = False,
) -> dict[float, Estimate]:
    """The distillation loss at each bit width (arXiv 2510.14823, figure 2), on the same held-out draws.

    Args:
        student: prepared and untrained. Clips that are not max-abs are searched anew at each width. Afterwards the
            student is as before.
        split: what to measure on, the validation split; of a large one the first pictures.

    Returns:
        Bit width -> loss, in the order given.
    """
    before = [(layer, layer.bit_width, layer.rounding) for _, layer in named_layers(student, FakeQuantizedLinear)]
    curve = {}
    try:
        for width in each(list(widths), "loss against bit width", "width", shown=progress):
            set_bit_width(student, width)
            curve[width] = Estimate.of(_picture_losses(student, teacher, split, draws))
    finally:
        for layer, bit_width, rounding in before:
            layer.set_bit_width(bit_width, rounding)
    return curve


def probe_layers(
    recipe: Recipe,
    teacher: nn.Module,
    splits: dict[str, CachedSplit],
    draws: Draws,
    accelerator: Accelerator,
    steps: int,
    *,
    progress: bool = False,
) -> dict[str, Probe]:
    """Train each group of layers for a few steps, always from the same prepared student, and measure it.

    A probe is the recipe's run in small: its schedules of width and learning rate go from end to end. So
    few steps favour what learns fast.

    Returns:
        Group of the family -> probe, in the reverse of the family's order: "all" last.
    """
    groups = list(reversed(get_family(recipe.family).layer_groups))
    warmup = recipe.optimizer.warmup_steps * steps // recipe.steps
    small = replace(
        recipe,
        steps=steps,
        optimizer=replace(recipe.optimizer, warmup_steps=warmup),
        keep_stages=[],
        save_every=0,
        validate_every=0,
    )
    probes = {}
    with Progress("probe layers", len(groups) * steps, "step", shown=progress) as bar:
        for group in groups:
            bar.stage(f"probe layers, {group}")
            run = replace(small, train_layers=group)
            probes[group] = _probe(run, teacher, splits, draws, accelerator, lambda _: bar.update())
    return probes


def _probe(
    recipe: Recipe,
    teacher: nn.Module,
    splits: dict[str, CachedSplit],
    draws: Draws,
    accelerator: Accelerator,
    after_step: Callable[[int], Any],
) -> Probe:
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    student = prepare_student(recipe, teacher, splits["train"], draws)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in student.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    times = [time.perf_counter()]

    def note(step: int) -> None:
        times.append(time.perf_counter())
        after_step(step)

    with tempfile.TemporaryDirectory() as folder:
        distill(recipe, student, teacher, splits, draws, Path(folder), accelerator, False, False, note)
    peak = torch.cuda.max_memory_allocated(accelerator.device) / 2**20 if on_gpu else peak_rss_mib()
    set_bit_width(student, recipe.quantization.weight_bits)
    losses = _picture_losses(student.eval(), teacher, splits["validation"], draws)
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    return Probe(trained, trained / sum(size for size, _ in sizes), losses, seconds, peak)


def advise(probes: Mapping[str, Probe], tolerance: float = TOLERANCE) -> tuple[str, str]:
    """The smallest group whose loss is surely (by two standard errors) within ``tolerance`` of training all.

    Returns:
        Its name, and a sentence that says why.
    """
    everything = probes["all"]
    for group, probe in sorted(probes.items(), key=lambda item: item[1].trained_parameters):
        difference = relative_difference(probe.losses, everything.losses)
        if group != "all" and difference.error is not None and difference.mean + 2 * difference.error <= tolerance:
            return group, (
                f"train {group}: {probe.share:.0%} of the parameters, its loss {difference.mean:+.1%} ± "
                f"{difference.error:.1%} against training all (paired over {len(probe.losses)} pictures)."
            )
    return "all", (
        f"train all: of no smaller group is it sure that its loss is within {tolerance:.0%} of training all "
        f"(two standard errors, paired over {len(everything.losses)} pictures)."
    )


def relative_difference(losses: Sequence[float], reference: Sequence[float]) -> Estimate:
    """How far the mean loss is above the reference's, as a share of it; paired by picture."""
    mean = statistics.fmean(reference)
    return Estimate.of([(loss - other) / mean for loss, other in zip(losses, reference, strict=True)])


def _picture_losses(student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws) -> list[float]:
    """The held-out loss of each picture: the mean of its draws."""
    part = split.first(PICTURES)
    losses = held_out_loss(student, teacher, part, draws, repeats=DRAWS)
    return [statistics.fmean(losses[picture :: len(part)]) for picture in range(len(part))]
