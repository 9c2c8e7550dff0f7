"""95% intervals of measured numbers: what another draw of as many samples could have given.

mean of independent samples    `bootstrap_interval`, the percentile bootstrap
distance of two sets           `jackknife_interval`, the delete-a-group jackknife

A set metric such as a Fréchet distance must not be bootstrapped: a resample holds only about 63% of the samples, the
others twice or more, and the distance of such a set is biased upwards by far more than its error. The jackknife leaves
samples out and repeats none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

RESAMPLES = 10_000
GROUPS = 20
_STUDENT_T = 2.093  # 97.5% point with GROUPS - 1 degrees of freedom
_CHUNK = 2**22


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """95% percentile bootstrap interval of the mean (Efron 1979), from `RESAMPLES` resamples.

    Args:
        values: one finite number for each independent sample. Numbers that belong together, such as several draws of
            one picture, are averaged first.
        seed: of the resampling's own generator.

    Returns:
        (low, high), or None for fewer than 2 values.

    Raises:
        ValueError: a value that is not finite.

    >>> low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0])
    >>> 1 <= low < 2.5 < high <= 4
    True
    """
    if not all(math.isfinite(value) for value in values):
        raise ValueError("A bootstrap interval needs finite values; leave the others out and say how many.")
    if len(values) < 2:
        return None
    samples, random = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(samples))
    means = [
        samples[random.integers(len(samples), size=(min(rows, RESAMPLES - first), len(samples)))].mean(axis=1)
        for first in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def jackknife_interval(
    distance: Callable[[Tensor, Tensor], float], features_a: Tensor, features_b: Tensor
) -> tuple[float, float] | None:
    """95% interval of a distance of two sets, by the delete-a-group jackknife with `GROUPS` groups.

    Row i of each set is in group i mod `GROUPS`; the group is left out of both sets at once, so rows that belong
    together (pictures of one prompt and seed) leave together, and where nothing belongs together it does no harm. The
    interval is the distance ± t standard errors (Shao & Tu, "The Jackknife and Bootstrap", 1995, section 2.3), cut at
    0. It covers the chance of the draw, not the bias of small sets, which the distance itself has.

    Args:
        distance: of two matrices of features, >= 0.
        features_a: [N, D].
        features_b: [M, D].

    Returns:
        (low, high), or None where a group would hold fewer than 2 rows.
    """
    if min(len(features_a), len(features_b)) < 2 * GROUPS:
        return None
    without = [distance(_without(features_a, group), _without(features_b, group)) for group in range(GROUPS)]
    error = math.sqrt((GROUPS - 1) ** 2 / GROUPS) * float(np.std(without, ddof=1))
    centre = distance(features_a, features_b)
    return max(0.0, centre - _STUDENT_T * error), centre + _STUDENT_T * error


def _without(features: Tensor, group: int) -> Tensor:
    return features[[row for row in range(len(features)) if row % GROUPS != group]]
