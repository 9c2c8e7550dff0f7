"""Observed ranges equal numpy's over all batches together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fbqat_hub.quantization.observer import RangeObserver, affine_parameters


@pytest.fixture
def batches() -> list[Tensor]:
    """Of unequal sizes, spreads and means."""
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(size, 6, generator=random) * spread + mean
        for size, spread, mean in ((3, 1, 5), (50, 2, -1), (1, 9, 0))
    ]


def observed(batches: list[Tensor]) -> tuple[RangeObserver, np.ndarray]:
    observer = RangeObserver()
    for batch in batches:
        observer.observe(batch)
    return observer, np.concatenate([batch.double().numpy().ravel() for batch in batches])


def test_mean_3sigma_is_pooled_over_all_batches(batches: list[Tensor]) -> None:
    observer, values = observed(batches)
    assert observer.count == values.size
    assert observer.mean == pytest.approx(values.mean(), rel=1e-12)
    low, high = observer.range("mean_3sigma")
    assert low == pytest.approx(max(values.min(), values.mean() - 3 * values.std()), rel=1e-12)
    assert high == pytest.approx(min(values.max(), values.mean() + 3 * values.std()), rel=1e-12)
    assert values.min() < low  # the rule does clip here
    assert high < values.max()


def test_a_mean_far_from_0_loses_no_digits() -> None:
    """The naive sum of squares would: 1e6 squared leaves no room for a variance of 1 in float32."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 1e6
    observer, exact = observed([values[:300], values[300:]])
    assert observer.range("mean_3sigma")[1] == pytest.approx(min(exact.max(), exact.mean() + 3 * exact.std()), abs=1e-3)


def test_a_skewed_input_is_not_given_room_below_what_was_seen() -> None:
    low, high = observed([torch.cat([torch.zeros(1000), torch.tensor([9.0])])])[0].range("mean_3sigma")
    assert low == 0
    assert 0 < high < 9


def test_min_max(batches: list[Tensor]) -> None:
    observer, values = observed(batches)
    assert observer.range("min_max") == (values.min(), values.max())


@pytest.mark.parametrize("percentile", [100, 99.9, 90])
def test_percentile(batches: list[Tensor], percentile: float) -> None:
    observer, values = observed(batches)
    tail = (100 - percentile) / 2
    expected = np.percentile(values, [tail, 100 - tail])
    assert observer.range("percentile", percentile) == pytest.approx(tuple(expected), rel=1e-5)


def test_a_long_calibration_samples_every_batch_and_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """More values than are kept: the sample stands for the late batches as for the early, odd channels as for even."""
    monkeypatch.setattr(RangeObserver, "_SAMPLE", 4096)
    batch = torch.zeros(64, 16, 8)
    batch[:, :, 3] = 1.0  # one channel of eight
    observer = RangeObserver()
    for index in range(20):
        observer.observe(batch * (10 if index >= 10 else 1))
    sample = torch.cat(observer._samples)
    assert 2048 <= len(sample) <= 4096
    # 1/16 of all values is 1 and 1/16 is 10; 4 standard deviations of a share of 2048 draws = 0.021
    for value in (1, 10):
        assert (sample == value).double().mean().item() == pytest.approx(1 / 16, abs=0.021)
    assert observer.range("percentile", 95) == (0.0, 10.0)  # 2.5% at each end
    assert observer.range("percentile", 82) == (0.0, 1.0)  # 9%


def test_the_sample_leaves_the_random_state_alone(batches: list[Tensor]) -> None:
    before = torch.get_rng_state()
    first, second = (observed(batches)[0].range("percentile", 90) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rule", ["mean_3sigma", "min_max", "percentile"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_always_contains_0(rule: str, sign: int) -> None:
    observer, _ = observed([sign * (torch.rand(100) + 5)])
    low, high = observer.range(rule)  # type: ignore[arg-type]
    assert low <= 0 <= high
    assert (high if sign > 0 else -low) > 5


def test_refused(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.to_q"):
        RangeObserver("blocks.0.to_q").range()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"blocks\.0\.to_q is not finite"):
            RangeObserver("blocks.0.to_q").observe(torch.tensor([1.0, bad]))
    observer, _ = observed(batches)
    with pytest.raises(ValueError, match="'mean_3sigma', 'min_max', 'percentile'"):
        observer.range("sigma")  # type: ignore[arg-type]
    for percentile in (0, 100.1, -5):
        with pytest.raises(ValueError, match="percentile"):
            observer.range("percentile", percentile)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 6.0), (-3.0, 0.0), (-0.2, 5.0), (0.0, 0.0)])
def test_affine_parameters_cover_the_range_with_an_exact_0(low: float, high: float, bits: int) -> None:
    scale, zero_point = affine_parameters(low, high, bits)
    levels = 2**bits - 1
    assert scale > 0
    assert 0 <= zero_point <= levels
    assert isinstance(zero_point, int)
    assert scale == pytest.approx(max(high - low, 1e-6) / levels)
    assert scale == torch.tensor(scale).item()  # float32 holds it
    # the ends are within half a step, for the zero_point is rounded
    assert scale * (0 - zero_point) <= low + scale / 2 * 1.0001
    assert scale * (levels - zero_point) >= high - scale / 2 * 1.0001
