"""The equation and its gradient, against float64 references written from the paper and not from the code."""

from __future__ import annotations

import math
from inspect import getmodule as module_of
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fbqat_hub.quantization import Rounding, fake_quantize
from fbqat_hub.quantization.fake_quantize import check_bit_width, grid, symmetric_scale
from fbqat_hub.quantization.quantize import quantize

WIDTHS = (2, 2.5, 3, 3.7, 4, 4.25, 4.5, 4.75, 5, 5.5, 6, 7, 7.99, 8, 16)
# how a weight [4, 6] is seen by each granularity: rows that share a scale
GRANULARITIES = {"per_tensor": (1, 24), "per_channel": (4, 6), "per_group": (4, 3, 2)}
Array = NDArray[np.float64]


def reference(weight: Array, clip: Array, bits: float) -> Array:
    """Equation 1, with the codes clipped."""
    scale = clip / (2 ** (bits - 1) - 1)
    half = np.floor(2 ** (bits - 1))
    return np.clip(np.rint(weight / scale), -half, half - 1) * scale


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", GRANULARITIES.values(), ids=GRANULARITIES.keys())
@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_values_and_codes_are_those_of_the_equation(shape: tuple[int, ...], bits: float, ratio: float) -> None:
    weight = normal(*shape)
    clip = ratio * weight.abs().amax(-1, keepdim=True)
    expected = reference(weight.numpy(), clip.numpy(), bits)
    np.testing.assert_allclose(fake_quantize(weight, clip, bits), expected, rtol=1e-13)
    if bits <= 8:
        scale = symmetric_scale(clip, bits)
        codes = quantize(weight, scale, bits)
        assert codes.dtype == torch.int8
        np.testing.assert_allclose(codes * scale, expected, rtol=1e-13)


@pytest.mark.parametrize(("bits", "low", "high"), [(6, -32, 31), (5.5, -22, 21), (5, -16, 15), (4, -8, 7), (2, -2, 1)])
def test_grids_of_the_paper(bits: float, low: int, high: int) -> None:
    assert grid(bits) == (low, high)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    weight = normal(3, 4, dtype=torch.float32).to(dtype)
    clip = weight.abs().amax(-1, keepdim=True)
    assert fake_quantize(weight, clip, 4).dtype == dtype
    assert fake_quantize(weight, clip, torch.tensor(4.0)).dtype == dtype


class TestWeightGradient:
    def test_straight_through_inside_and_nothing_where_clipped(self) -> None:
        weight = torch.tensor([-8.6, -8.2, -7.9, -3.3, 0.0, 2.5, 6.9, 7.2, 7.6], requires_grad=True)
        grad = torch.arange(1.0, 10.0)
        on_grid = fake_quantize(weight, torch.tensor(7.0), 4)  # S = 1
        (found,) = gradients(on_grid, grad, weight)
        assert on_grid.tolist() == [-8, -8, -8, -3, 0, 2, 7, 7, 7]
        assert found.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0]

    @pytest.mark.parametrize("bits", [4, 5, 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_largest_weight_keeps_its_gradient(self, bits: int, dtype: torch.dtype) -> None:
        """max|W| / S is a rounding error above the largest code in one row of twelve."""
        weight = normal(2000, 8, dtype=torch.float32).to(dtype).requires_grad_()
        clip = weight.detach().abs().amax(-1, keepdim=True)
        steps = weight.detach() / symmetric_scale(clip, bits)
        assert bool((steps > grid(bits)[1]).any())
        (found,) = gradients(fake_quantize(weight, clip, bits), torch.ones_like(weight), weight)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1), (1, 1), (), (5,), (7, 5), (1, 5)], ids=str)
@pytest.mark.parametrize("ewgs", [0.0, 0.2])
def test_a_large_weight_is_quantized_in_parts_to_the_bit(
    shape: tuple[int, ...], dtype: torch.dtype, ewgs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clip's shape; also a square weight, whose clip of one dimension is of its columns."""

    def made(height: int) -> list[Tensor]:
        weight = normal(height, 5, dtype=torch.float32).to(dtype).requires_grad_()
        own = tuple(height if size == 7 else size for size in shape)
        clip = (0.3 + normal(*own, seed=2, dtype=torch.float32).abs()).to(dtype).requires_grad_()
        on_grid = fake_quantize(weight, clip, 4, rounding=Rounding(ewgs))
        return [on_grid, *gradients(on_grid, normal(height, 5, seed=1).to(dtype), weight, clip)]

    for height in (7, 5):
        whole = made(height)
        with monkeypatch.context() as patch:
            patch.setattr(module_of(fake_quantize), "_CACHED", 2 * 5 * dtype.itemsize)
            parts = made(height)
        assert all(map(torch.equal, whole, parts))


def test_where_the_map_is_differentiable_its_gradient_is_the_numerical_one() -> None:
    """Without rounding, away from the kinks of the clipping."""

    class NoRounding(Rounding):
        def forward(self, steps: torch.Tensor) -> torch.Tensor:
            return steps.clone()

    steps = torch.tensor([[-9.5, -7.8, -3.62, -0.1], [0.38, 2.2, 5.55, 7.9]], dtype=torch.float64)
    clip = torch.tensor([[1.3], [0.4]], dtype=torch.float64, requires_grad=True)
    weight = (steps * clip.detach() / 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, c: fake_quantize(w, c, 4, rounding=NoRounding()), (weight, clip))
