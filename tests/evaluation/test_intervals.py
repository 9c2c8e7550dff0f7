"""Intervals cover what they say, and sets are not bootstrapped for a reason."""

import numpy as np
import pytest
import torch

from fbqat_hub.evaluation.intervals import GROUPS, bootstrap_interval, jackknife_interval
from fbqat_hub.evaluation.metrics import frechet_distance


def test_bootstrap_interval_is_the_normal_one_for_many_samples_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(0).exponential(size=2000).tolist()
    low, high = bootstrap_interval(values)
    error = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
    assert (low, high) == pytest.approx((np.mean(values) - error, np.mean(values) + error), abs=0.1 * error)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)


def test_bootstrap_interval_needs_two_finite_values() -> None:
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, float("inf")])


def sets(seed: int, count: int = 80, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets whose rows belong together, as pictures of one prompt do."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, width, generator=generator)
    return a, 0.7 * a + 0.8 * torch.randn(count, width, generator=generator) + 0.5


def test_jackknife_interval_is_as_wide_as_the_distance_varies_from_draw_to_draw() -> None:
    draws = [sets(seed, width=2) for seed in range(30)]
    distances = [frechet_distance(a, b) for a, b in draws]
    intervals = [jackknife_interval(frechet_distance, a, b) for a, b in draws]
    errors = [(high - low) / 2 / 2.093 for low, high in intervals]
    assert np.mean(errors) == pytest.approx(np.std(distances, ddof=1), rel=0.3)
    covered = np.mean([low <= np.mean(distances) <= high for low, high in intervals])
    assert covered >= 0.85


def test_a_bootstrap_of_a_set_would_be_biased_by_more_than_the_interval() -> None:
    a, b = sets(0, count=96, width=32)
    rows = [torch.randint(96, (96,), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    _, high = jackknife_interval(frechet_distance, a, b)
    assert min(frechet_distance(a[index], b[index]) for index in rows) > high


def test_jackknife_interval_needs_groups_of_two_and_is_never_negative() -> None:
    a, b = sets(0, count=2 * GROUPS)
    assert jackknife_interval(frechet_distance, a[:-1], b) is None
    low, high = jackknife_interval(frechet_distance, a, a)
    assert low == 0
    assert high < 1e-6
