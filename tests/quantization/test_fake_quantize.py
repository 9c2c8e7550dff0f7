"""The equation and its gradient, against float64 references written from the paper and not from the code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fbqat_hub.quantization import Rounding, fake_quantize, fake_quantize_affine
from fbqat_hub.quantization.fake_quantize import check_bit_width, grid, quantize, soft_round, symmetric_scale

WIDTHS = (2, 2.5, 3, 3.7, 4, 4.25, 4.5, 4.75, 5, 5.5, 6, 7, 7.99, 8, 16)
# how a weight [4, 6] is seen by each granularity: rows that share a scale
GRANULARITIES = {"per_tensor": (1, 24), "per_channel": (4, 6), "per_group": (4, 3, 2)}
Array = NDArray[np.float64]


def reference_symmetric(weight: Array, clip: Array, bits: float, narrow: bool) -> Array:
    """Equation 1, with the codes clipped."""
    scale = clip / (2 ** (bits - 1) - 1)
    half = np.floor(2 ** (bits - 1))
    codes = np.clip(np.rint(weight / scale), -half + narrow, half - 1)
    return codes * scale


def reference_affine(weight: Array, bits: float) -> Array:
    """Equation 2, with the codes clipped."""
    low, high = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)
    scale = (high - low) / 2**bits
    codes = np.minimum(np.rint((weight - low) / scale), np.floor(2**bits) - 1)
    return codes * scale + low


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", GRANULARITIES.values(), ids=GRANULARITIES.keys())
class TestAgainstReference:
    @pytest.mark.parametrize("narrow", [False, True])
    @pytest.mark.parametrize("ratio", [1.0, 0.6])
    def test_symmetric(self, shape: tuple[int, ...], bits: float, narrow: bool, ratio: float) -> None:
        weight = normal(*shape)
        clip = ratio * weight.abs().amax(-1, keepdim=True)
        expected = reference_symmetric(weight.numpy(), clip.numpy(), bits, narrow)
        np.testing.assert_allclose(fake_quantize(weight, clip, bits, narrow=narrow), expected, rtol=1e-13)
        if bits <= 8:
            scale = symmetric_scale(clip, bits)
            codes = quantize(weight, scale, bits, narrow=narrow)
            assert codes.dtype == torch.int8
            np.testing.assert_allclose(codes * scale, expected, rtol=1e-13)

    def test_affine(self, shape: tuple[int, ...], bits: float) -> None:
        weight = normal(*shape)
        on_grid = fake_quantize_affine(weight, weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), bits)
        np.testing.assert_allclose(on_grid, reference_affine(weight.numpy(), bits), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("bits", "low", "high"), [(6, -32, 31), (5.5, -22, 21), (5, -16, 15), (4, -8, 7), (2, -2, 1)])
def test_grids_of_the_paper(bits: float, low: int, high: int) -> None:
    assert grid(bits) == (low, high)
    assert grid(bits, narrow=True) == (-high, high)
    assert grid(torch.tensor(bits)) == (low, high)
    # every code of the grid is reached, none beyond it
    steps = torch.arange(low - 3, high + 4, dtype=torch.float64)
    codes = quantize(steps, torch.tensor(1.0, dtype=torch.float64), bits)
    assert codes.unique().tolist() == list(range(low, high + 1))


@pytest.mark.parametrize("bits", [1.99, 16.01, 0, -4, math.nan, math.inf, -math.inf, "4", None])
def test_bit_width_out_of_range_is_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match="must be a number from 2 to 16"):
        check_bit_width(bits)
    with pytest.raises(ValueError, match="bit width"):
        fake_quantize(torch.ones(2), torch.ones(1), bits)


@pytest.mark.parametrize("changes", [{"softness": -0.1}, {"softness": 1.1}, {"softness": math.nan}, {"ewgs": -1.0}])
def test_rounding_out_of_range_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Rounding(**changes)


def test_codes_above_eight_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 8 bits"):
        quantize(torch.ones(2), torch.ones(1), 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    weight = normal(3, 4, dtype=torch.float32).to(dtype)
    clip = weight.abs().amax(-1, keepdim=True)
    assert fake_quantize(weight, clip, 4).dtype == dtype
    assert fake_quantize(weight, clip, torch.tensor(4.0)).dtype == dtype
    assert fake_quantize_affine(weight, -clip, clip, 4).dtype == dtype


class TestWeightGradient:
    def test_straight_through_inside_and_nothing_where_clipped(self) -> None:
        weight = torch.tensor([-8.6, -8.2, -7.9, -3.3, 0.0, 2.5, 6.9, 7.2, 7.6], requires_grad=True)
        grad = torch.arange(1.0, 10.0)
        on_grid = fake_quantize(weight, torch.tensor(7.0), 4)  # S = 1
        (found,) = gradients(on_grid, grad, weight)
        assert on_grid.tolist() == [-8, -8, -8, -3, 0, 2, 7, 7, 7]
        assert found.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0]

    def test_straight_through_of_the_affine_form(self) -> None:
        weight = torch.tensor([-0.2, 0.0, 0.3, 6.9, 7.1], requires_grad=True)
        on_grid = fake_quantize_affine(weight, torch.tensor(0.0), torch.tensor(8.0), 3)  # S = 1, codes 0..7
        assert gradients(on_grid, torch.ones(5), weight)[0].tolist() == [0, 1, 1, 1, 0]

    @pytest.mark.parametrize("bits", [4, 5, 8])
    @pytest.mark.parametrize("narrow", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_largest_weight_keeps_its_gradient(self, bits: int, narrow: bool, dtype: torch.dtype) -> None:
        """max|W| / S is a rounding error above the largest code in one row of twelve."""
        weight = normal(2000, 8, dtype=torch.float32).to(dtype).requires_grad_()
        clip = weight.detach().abs().amax(-1, keepdim=True)
        steps = weight.detach() / symmetric_scale(clip, bits)
        assert bool((steps > grid(bits)[1]).any())
        (found,) = gradients(fake_quantize(weight, clip, bits, narrow=narrow), torch.ones_like(weight), weight)
        assert bool((found == 1).all())


class TestClipAndWidthGradient:
    """With S = clip / (2^(b-1) - 1) and g the gradient of the output."""

    @staticmethod
    def per_step(weight: Tensor, clip: Tensor, bits: float) -> Tensor:
        """LSQ's dW_b / dS: round(v) - v inside, the bound outside."""
        low, high = -math.floor(2 ** (bits - 1)), math.floor(2 ** (bits - 1)) - 1
        steps = weight / (clip / (2 ** (bits - 1) - 1))
        inside = torch.round(steps) - steps
        return torch.where(steps < low, low, torch.where(steps > high, high, inside))

    @pytest.mark.parametrize("bits", [2, 4, 4.25, 8])
    @pytest.mark.parametrize("shape", GRANULARITIES.values(), ids=GRANULARITIES.keys())
    def test_clip_gradient_is_that_of_lsq(self, shape: tuple[int, ...], bits: float) -> None:
        weight, grad = normal(*shape), normal(*shape, seed=1)
        clip = (0.5 * weight.abs().amax(-1, keepdim=True)).requires_grad_()
        (found,) = gradients(fake_quantize(weight, clip, bits), grad, clip)
        expected = (grad * self.per_step(weight, clip.detach(), bits)).sum(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("bits", [2.5, 4, 5.5])
    def test_width_gradient(self, bits: float) -> None:
        """dS/db = -S ln2 2^(b-1) / (2^(b-1) - 1); a bound moves by ln2 2^(b-1) (STE for its floor)."""
        weight, grad, clip = normal(40), normal(40, seed=1), torch.tensor(0.9, dtype=torch.float64)
        width = torch.tensor(bits, dtype=torch.float64, requires_grad=True)
        (found,) = gradients(fake_quantize(weight, clip, width), grad, width)

        power = 2 ** (bits - 1)
        scale = float(clip) / (power - 1)
        through_scale = (grad * self.per_step(weight, clip, bits)).sum() * -scale * math.log(2) * power / (power - 1)
        steps = weight / scale
        side = (steps > math.floor(power) - 1).double() - (steps < -math.floor(power)).double()
        through_bounds = (grad * side).sum() * scale * math.log(2) * power
        assert side.abs().sum() > 2
        torch.testing.assert_close(found, through_scale + through_bounds, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize(("start", "price"), [(3.0, 0.0), (8.0, 0.1)])
    def test_a_width_learns(self, start: float, price: float) -> None:
        """Squared error alone asks for more bits; a price on bits, for fewer."""
        weight = normal(512)
        width = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([width], lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            error = (fake_quantize(weight, weight.abs().amax(), width) - weight).square().mean()
            (error + price * width).backward()
            optimizer.step()
        moved = width.item() - start
        assert (moved < -0.5) if price else (moved > 0.05)
        assert 2 <= width.item() <= 16

    def test_width_gradient_of_the_affine_form(self) -> None:
        """Inside: dL/db = dS/db * sum of g (Q - v), dS/db = -S ln2."""
        weight = torch.tensor([0.3, 1.2, 2.6], dtype=torch.float64)
        width = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        low, high = torch.tensor([0.0, 8.0], dtype=torch.float64)  # S = 1
        (found,) = gradients(fake_quantize_affine(weight, low, high, width), torch.ones(3, dtype=torch.float64), width)
        assert found.item() == pytest.approx(-math.log(2) * ((0 - 0.3) + (1 - 1.2) + (3 - 2.6)))


class TestTrueDerivatives:
    """Where the map is differentiable, its gradient is the numerical one (away from the kinks)."""

    # places in steps at softness 0.4: on steps (|r| < 0.3), on rises (|r| > 0.3), and clipped
    STEPS = torch.tensor([[-9.5, -7.8, -3.62, -0.1], [0.38, 2.2, 5.55, 7.9]], dtype=torch.float64)

    @pytest.mark.parametrize("rounding", [Rounding(softness=0.4, slope=True), Rounding(softness=1.0)], ids=str)
    def test_symmetric(self, rounding: Rounding) -> None:
        clip = torch.tensor([[1.3], [0.4]], dtype=torch.float64, requires_grad=True)
        weight = (self.STEPS * clip.detach() / 7).requires_grad_()
        assert torch.autograd.gradcheck(lambda w, c: fake_quantize(w, c, 4, rounding=rounding), (weight, clip))

    def test_affine(self) -> None:
        steps = torch.tensor([0.4, 3.62, 12.3, 15.7], dtype=torch.float64)  # codes 0..15
        low, high = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-0.7, 0.9))
        weight = (steps * (high - low).detach() / 16 + low.detach()).requires_grad_()
        soft = Rounding(softness=1.0)
        assert torch.autograd.gradcheck(
            lambda w, lo, hi: fake_quantize_affine(w, lo, hi, 4, rounding=soft), (weight, low, high)
        )


class TestCompensation:
    STEPS = torch.tensor([-9.0, -2.7, -0.4, 0.3, 1.6, 6.8, 9.0], dtype=torch.float64)
    GRAD = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0], dtype=torch.float64)
    REST = torch.tensor([0.0, 0.3, -0.4, 0.3, -0.4, -0.2, 0.0], dtype=torch.float64)  # v - round(v)
    INSIDE = torch.tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.float64)

    def both_gradients(self, rounding: Rounding) -> tuple[Tensor, ...]:
        clip = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)  # S = 1/2
        weight = (self.STEPS / 2).requires_grad_()
        return gradients(fake_quantize(weight, clip, 4, rounding=rounding), self.GRAD, weight, clip)

    def test_ewgs(self) -> None:
        weight_grad, _ = self.both_gradients(Rounding(ewgs=0.2))
        expected = self.INSIDE * self.GRAD * (1 + 0.2 * self.GRAD.sign() * self.REST)
        torch.testing.assert_close(weight_grad, expected)

    def test_dampening_is_the_gradient_of_the_published_loss(self) -> None:
        """lambda * ||S round(w / S) - clip(w)||^2, S and the rounded weight held fixed."""
        weight_grad, clip_grad = self.both_gradients(Rounding(dampening=0.1))
        plain_weight_grad, plain_clip_grad = self.both_gradients(Rounding())
        torch.testing.assert_close(weight_grad, plain_weight_grad + self.INSIDE * 2 * 0.1 * self.REST / 2)
        torch.testing.assert_close(clip_grad, plain_clip_grad, rtol=0, atol=0)

    def test_slope(self) -> None:
        """At softness 0.5 a rise is where |v - round(v)| > 0.25, and its slope is 2."""
        weight_grad, _ = self.both_gradients(Rounding(softness=0.5, slope=True))
        rise = (self.REST.abs() > 0.25).double()
        torch.testing.assert_close(weight_grad, self.INSIDE * self.GRAD * rise * 2)

    def test_the_forward_is_untouched(self) -> None:
        weight, clip = normal(50), torch.tensor(1.5, dtype=torch.float64)
        compensated = fake_quantize(weight, clip, 4, rounding=Rounding(slope=True, ewgs=0.5, dampening=0.5))
        assert torch.equal(compensated, fake_quantize(weight, clip, 4))


class TestStaircase:
    STEPS = torch.linspace(-3, 3, 60001, dtype=torch.float64)  # 1e-4 apart

    @pytest.mark.parametrize("softness", [0.01, 0.15, 0.5, 0.9])
    def test_continuous_monotone_and_on_the_grid_where_flat(self, softness: float) -> None:
        stairs = soft_round(self.STEPS, softness)
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
        assert torch.equal(soft_round(points, softness), points)
        if softness:
            torch.testing.assert_close(soft_round(points + 0.5, softness), points + 0.5)

    def test_limits(self) -> None:
        assert torch.equal(soft_round(self.STEPS, 0.0), self.STEPS.round())
        torch.testing.assert_close(soft_round(self.STEPS, 1.0), self.STEPS, rtol=0, atol=1e-15)
        away = (self.STEPS - self.STEPS.floor() - 0.5).abs() > 1e-3
        assert torch.equal(soft_round(self.STEPS, 1e-3)[away], self.STEPS.round()[away])

    def test_between_two_points_by_hand(self) -> None:
        """Softness 0.2: flat to 0.4, then 5 steps a step to 0.6."""
        found = soft_round(torch.tensor([0.4, 0.42, 0.5, 0.58, 0.6], dtype=torch.float64), 0.2)
        torch.testing.assert_close(found, torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=torch.float64))

    @pytest.mark.parametrize("softness", [1e-6, 1e-7, 1e-8, 1e-12])
    def test_a_vanishing_softness_stays_between_the_neighbours(self, softness: float) -> None:
        """In float32 the rounding error of |r| - 1/2, over such a softness, would be more than a step."""
        steps = torch.tensor(0.5).nextafter(torch.tensor(0.0)) + torch.arange(4.0)
        stairs = soft_round(steps, softness)
        assert bool(((stairs - steps).abs() <= 0.5).all())

    def test_softness_one_is_the_clipped_weight(self) -> None:
        weight = normal(100)
        found = fake_quantize(weight, torch.tensor(0.7, dtype=torch.float64), 4, rounding=Rounding(softness=1.0))
        torch.testing.assert_close(found, weight.clamp(-0.8, 0.7), rtol=1e-14, atol=1e-16)
