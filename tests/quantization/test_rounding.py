"""The forms of rounding: where values go, and what comes back."""

from __future__ import annotations

import math

import pytest
import torch

from fbqat_hub.quantization import HardRounding, Rounding, SoftStaircase, fake_quantize


class TestStaircase:
    STEPS = torch.linspace(-3, 3, 60001, dtype=torch.float64)  # 1e-4 apart

    @pytest.mark.parametrize("softness", [0.01, 0.15, 0.5, 0.9])
    def test_continuous_monotone_and_on_the_grid_where_flat(self, softness: float) -> None:
        stairs = SoftStaircase(softness).forward(self.STEPS)
        rises = stairs.diff()
        assert rises.min() >= -1e-12
        assert rises.max() <= 1e-4 / softness + 1e-9  # no jump
        nearest = self.STEPS.round()
        flat = (self.STEPS - nearest).abs() < (1 - softness) / 2 - 1e-9
        assert torch.equal(stairs[flat], nearest[flat])
        assert not torch.isclose(stairs[~flat], nearest[~flat], atol=1e-9).all()

    @pytest.mark.parametrize("softness", [0.0, 1e-7, 0.3, 1.0])
    def test_grid_points_and_thresholds_never_move(self, softness: float) -> None:
        points = torch.arange(-8.0, 8.0)
        assert torch.equal(SoftStaircase(softness).forward(points), points)
        if softness:
            torch.testing.assert_close(SoftStaircase(softness).forward(points + 0.5), points + 0.5)

    def test_limits(self) -> None:
        assert torch.equal(SoftStaircase(0.0).forward(self.STEPS), self.STEPS.round())
        torch.testing.assert_close(SoftStaircase(1.0).forward(self.STEPS), self.STEPS, rtol=0, atol=1e-15)
        away = (self.STEPS - self.STEPS.floor() - 0.5).abs() > 1e-3
        assert torch.equal(SoftStaircase(1e-3).forward(self.STEPS)[away], self.STEPS.round()[away])

    def test_between_two_points_by_hand(self) -> None:
        """Softness 0.2: flat to 0.4, then 5 steps a step to 0.6."""
        found = SoftStaircase(0.2).forward(torch.tensor([0.4, 0.42, 0.5, 0.58, 0.6], dtype=torch.float64))
        torch.testing.assert_close(found, torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=torch.float64))

    @pytest.mark.parametrize("softness", [1e-6, 1e-7, 1e-8, 1e-12])
    def test_a_vanishing_softness_stays_between_the_neighbours(self, softness: float) -> None:
        """In float32 the rounding error of |r| - 1/2, over such a softness, would be more than a step."""
        steps = torch.tensor(0.5).nextafter(torch.tensor(0.0)) + torch.arange(4.0)
        stairs = SoftStaircase(softness).forward(steps)
        assert bool(((stairs - steps).abs() <= 0.5).all())


STEPS = torch.tensor([-9.0, -2.7, -0.4, 0.3, 1.6, 6.8, 9.0], dtype=torch.float64)
GRAD = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0], dtype=torch.float64)
REST = torch.tensor([0.0, 0.3, -0.4, 0.3, -0.4, -0.2, 0.0], dtype=torch.float64)  # v - round(v)
INSIDE = torch.tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.float64)


@pytest.mark.parametrize("rounding", [HardRounding(0.2), SoftStaircase(0.3, 0.2)], ids=repr)
def test_ewgs_is_the_published_rule_where_nothing_is_clipped_and_leaves_the_forward_alone(rounding: Rounding) -> None:
    clip = torch.tensor(3.5, dtype=torch.float64)  # S = 1/2
    weight = (STEPS / 2).requires_grad_()
    plain = HardRounding() if rounding.hard else SoftStaircase(0.3)
    on_grid = fake_quantize(weight, clip, 4, rounding=rounding)
    assert torch.equal(on_grid, fake_quantize(weight, clip, 4, rounding=plain))
    (found,) = torch.autograd.grad(on_grid, weight, GRAD)
    torch.testing.assert_close(found, INSIDE * GRAD * (1 + 0.2 * GRAD.sign() * REST))


@pytest.mark.parametrize("rounding", [HardRounding(), SoftStaircase(0.0), SoftStaircase(0.3)], ids=repr)
def test_without_ewgs_the_gradient_passes(rounding: Rounding) -> None:
    assert torch.equal(rounding.backward(GRAD, STEPS), GRAD)


def test_softness_zero_is_hard() -> None:
    assert SoftStaircase(0.0).hard
    assert HardRounding().hard
    assert not SoftStaircase(1e-9).hard
    assert torch.equal(SoftStaircase(0.0).forward(STEPS), HardRounding().forward(STEPS))


@pytest.mark.parametrize("softness", [-0.1, 1.1, math.nan])
def test_softness_out_of_range_is_refused(softness: float) -> None:
    with pytest.raises(ValueError, match="softness is"):
        SoftStaircase(softness)


@pytest.mark.parametrize("ewgs", [-1.0, math.inf, math.nan])
def test_ewgs_out_of_range_is_refused(ewgs: float) -> None:
    for make in (lambda: HardRounding(ewgs), lambda: SoftStaircase(0.1, ewgs)):
        with pytest.raises(ValueError, match="ewgs is"):
            make()
