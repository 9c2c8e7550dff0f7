"""Metrics of pictures by name, each with its sample count, spread and 95% interval.

paired          picture against the reference of the same name    psnr, ssim, lpips
distance        set of pictures against set of pictures           fd, fid, clip_fid
prompted        picture against its prompt                        clip_score, image_reward
single          picture alone                                     clip_iqa
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.evaluation import learned
from fbqat_hub.evaluation.features import EXTRACTOR, OpenMojiFeatures
from fbqat_hub.evaluation.folders import batches, pairs
from fbqat_hub.evaluation.intervals import bootstrap_interval, jackknife_interval
from fbqat_hub.evaluation.metrics import SSIM_WINDOW, frechet_distance, psnr, ssim
from fbqat_hub.pictures import size_of

PAIRED = ("psnr", "ssim", "lpips")
DISTANCES = {"fd": EXTRACTOR, "fid": "inception-2015-12-05", "clip_fid": "clip-vit-base-patch32"}
PROMPTED = ("clip_score", "image_reward")
SINGLE = ("clip_iqa",)


class NotMeasurableError(ValueError):
    """The pictures do not give this metric; the text says why."""


@dataclass(frozen=True)
class Measurement:
    """A number and how sure it is.

    Attributes:
        value: the mean over the samples, or the distance of the sets.
        n: samples it comes from: pictures, or pairs of pictures.
        spread: standard deviation over the samples; None for a distance.
        interval: (low, high), 95%; None where there are too few samples for one.
        extra: what else belongs to it, such as the extractor of a distance.
    """

    value: float
    n: int
    spread: float | None = None
    interval: tuple[float, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def measure(
    metric: str,
    files: Sequence[Path],
    *,
    references: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    device: str = "cpu",
    seed: int = 0,
) -> Measurement:
    """A metric by name over pictures.

    A pair of equal pictures has no PSNR (it is infinite): it is left out, and ``extra["equal"]`` says how many were.

    Args:
        metric: of `PAIRED`, `DISTANCES`, `PROMPTED` or `SINGLE`.
        files: the pictures.
        references: for `PAIRED`, of the same size and in the same order; for `DISTANCES`, any.
        prompts: for `PROMPTED`, in the order of ``files``.
        device: where networks run.
        seed: of the bootstrap.

    Raises:
        NotMeasurableError: psnr where all pairs are equal, ssim of pictures smaller than its window, a distance of
            fewer than 2 pictures.
        ValueError: no pictures, a pair of two sizes, or a value that is not finite.
    """
    if metric in DISTANCES:
        return measure_distance(metric, *(features_of(metric, each, device=device) for each in (files, references)))
    if metric in PROMPTED:
        scores = {"clip_score": learned.clip_scores, "image_reward": learned.image_rewards}[metric]
        return of_samples(scores(files, prompts, device), seed=seed)
    if metric == "clip_iqa":
        return of_samples(learned.clip_iqa_scores(files, device), seed=seed)
    if metric == "lpips":
        return of_samples(learned.lpips_distances(files, references, device), seed=seed)
    if metric == "ssim" and files:
        width, height = min((size_of(file) for file in files), key=min)
        if min(width, height) < SSIM_WINDOW:
            raise NotMeasurableError(f"pictures of {width} x {height} pixels; SSIM needs {SSIM_WINDOW} on each side")
    function = {"psnr": psnr, "ssim": ssim}[metric]
    values = [value for a, b in pairs(files, references) for value in function(a, b).tolist()]
    different = [value for value in values if value != math.inf]  # of equal pictures the PSNR is infinite
    if values and not different:
        raise NotMeasurableError(f"all {len(values)} pairs are equal, and the PSNR of equal pictures is infinite")
    equal = len(values) - len(different)
    return of_samples(different, seed=seed, extra={"equal": equal} if equal else {})


def check_libraries(metrics: Sequence[str]) -> None:
    """See that the libraries of metrics can be imported, before anything is generated for them.

    Raises:
        ImportError: names the library and what installs it.
    """
    for metric in metrics:
        if metric in learned.LIBRARIES:
            learned.library(metric)


def features_of(distance: str, files: Sequence[Path], *, device: str = "cpu") -> Tensor:
    """Features [N, D] of pictures for a distance of `DISTANCES`."""
    extractors: dict[str, Callable[[Sequence[Path], str], Tensor]] = {
        "fd": openmoji_features,
        "fid": learned.inception_features,
        "clip_fid": learned.clip_features,
    }
    return extractors[distance](files, device)


def measure_distance(distance: str, features: Tensor, references: Tensor) -> Measurement:
    """The Fréchet distance of two sets of features, from `features_of`.

    Returns:
        ``n`` counts the first set; ``extra`` has the extractor, and ``n_reference`` where the second set has another
        size.

    Raises:
        NotMeasurableError: fewer than 2 pictures in a set.
    """
    if min(len(features), len(references)) < 2:
        raise NotMeasurableError(
            f"a distance of two sets needs at least 2 pictures in each; there are {len(features)} and {len(references)}"
        )
    extra: dict[str, Any] = {"extractor": DISTANCES[distance]}
    if len(features) != len(references):
        extra["n_reference"] = len(references)
    value = frechet_distance(features, references)
    interval = jackknife_interval(frechet_distance, features, references)
    return Measurement(value, len(features), interval=interval, extra=extra)


def of_samples(values: Sequence[float], *, seed: int = 0, extra: dict[str, Any] | None = None) -> Measurement:
    """The mean of independent samples, with its spread and interval (None for one sample).

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    if not values:
        raise ValueError("There is nothing to measure: no pictures.")
    if broken := sum(not math.isfinite(value) for value in values):
        raise ValueError(f"{broken} of {len(values)} values are not finite (NaN): a picture or the network is broken.")
    spread = statistics.stdev(values) if len(values) > 1 else None
    interval = bootstrap_interval(values, seed=seed)
    return Measurement(statistics.fmean(values), len(values), spread, interval, extra or {})


def of_timesteps(
    losses: Sequence[float], timesteps: Sequence[float], *, bins: int = 10, seed: int = 0
) -> list[dict[str, Any]]:
    """The held-out distillation loss over the noise level: where in sampling the student errs.

    The edges are quantiles of the timesteps, so every bin has about as many draws; equal timesteps stay together, and
    a model of few steps has a bin for each.

    Args:
        losses: one for each draw.
        timesteps: of the same draws, in the unit the denoiser takes.
        bins: at most so many.

    Returns:
        For each bin, from little noise to much: ``low`` and ``high`` (its least and greatest timestep), ``value`` (the
        mean loss), ``n`` and ``interval``.
    """
    rows = sorted(zip(timesteps, losses, strict=True))
    edges = [rows[len(rows) * edge // bins][0] for edge in range(1, bins)]
    groups: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        groups.setdefault(sum(row[0] >= edge for edge in edges), []).append(row)
    found = []
    for group in groups.values():
        mean = of_samples([loss for _, loss in group], seed=seed)
        interval = list(mean.interval) if mean.interval else None
        found.append({"low": group[0][0], "high": group[-1][0], "value": mean.value, "n": mean.n, "interval": interval})
    return found


@torch.no_grad()
def openmoji_features(files: Sequence[Path], device: str = "cpu") -> Tensor:
    """Features [N, 64] on the extractor that ships, which is not Inception."""
    model = OpenMojiFeatures.load().to(device)
    return torch.cat([model(batch.to(device)).cpu() for batch in batches(files)])
