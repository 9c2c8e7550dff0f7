"""The equation: fake quantization at a real-valued bit width, and its gradient.

Source: "FraQAT: Quantization Aware Training with Fractional bits", arXiv 2510.14823, equations 1 and 2.

    symmetric (eq. 1)   S = max|W| / (2^(b-1) - 1)      Q = round(W / S)              W_b = S * Q
    affine    (eq. 2)   S = (w_max - w_min) / 2^b       Q = round((W - w_min) / S)    W_b = S * Q + w_min

Nothing in either form needs the bit width ``b`` to be an integer. Codes are clipped to the grid of that
width: [-32, 31] at 6 bits, [-22, 21] at 5.5, [-16, 15] at 5 (``grid``).

The gradient passes the rounding by a straight-through estimator: ``round`` counts as having derivative 1, and what
follows from that by the chain rule is exact (``_FakeQuantize``). A clipped code passes nothing to its weight; a
learned clip gets the gradient of LSQ (arXiv 1902.08153); the bit width gets one too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

# A bit width, or what is computed from one: a number, or a scalar tensor that is being trained.
Width = TypeVar("Width", float, Tensor)

MIN_BIT_WIDTH = 2.0
MAX_BIT_WIDTH = 16.0


@dataclass(frozen=True)
class Rounding:
    """How ``round`` behaves on the way to the grid, forward and backward.

    Attributes:
        softness: 0 is the hard grid, 1 the float weight (clipped). In between, the soft staircase: values
            within softness/2 of a rounding threshold keep a fraction, all others sit on the grid, and the
            map stays continuous. The grid points never move.
        slope: use the staircase's own derivative (0 on a step, 1/softness on a rise) instead of 1.
        ewgs: strength of element-wise gradient scaling, in 1/steps (Lee, Kim and Ham, CVPR 2021,
            arXiv 2104.00903, eq. 4): g * (1 + ewgs * sign(g) * (v - round(v))). 0 is off.
        dampening: strength of oscillation dampening (Nagel et al., ICML 2022, arXiv 2203.11086): adds the gradient of
            dampening * (w - S round(w / S))^2 to every weight that is not clipped, and nothing to the clip. 0 is off.
    """

    softness: float = 0.0
    slope: bool = False
    ewgs: float = 0.0
    dampening: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.softness <= 1.0:
            raise ValueError(f"softness is {self.softness}; it must be within 0 (hard grid) and 1 (float).")
        if not (math.isfinite(self.ewgs) and self.ewgs >= 0 and math.isfinite(self.dampening) and self.dampening >= 0):
            raise ValueError(f"ewgs is {self.ewgs} and dampening {self.dampening}; both must be finite and >= 0.")


HARD = Rounding()


def check_bit_width(bit_width: float) -> float:
    """Return ``bit_width`` as a float, or raise ValueError if it is not a number from 2 to 16."""
    if not (isinstance(bit_width, (int, float)) and MIN_BIT_WIDTH <= bit_width <= MAX_BIT_WIDTH):
        raise ValueError(
            f"bit width is {bit_width!r}; it must be a number from {MIN_BIT_WIDTH:g} to {MAX_BIT_WIDTH:g}."
        )
    return float(bit_width)


def grid(bit_width: Width, *, narrow: bool = False) -> tuple[Width, Width]:
    """The smallest and largest code of the symmetric grid: floats, or tensors if the width is one.

    Args:
        bit_width: b. The bounds of a tensor that requires grad carry the gradient of 2^(b-1) (STE for floor).
        narrow: leave out the most negative code, so that the grid is symmetric about 0.

    >>> [grid(b) for b in (6, 5.5, 5, 4.25, 4)]
    [(-32.0, 31.0), (-22.0, 21.0), (-16.0, 15.0), (-9.0, 8.0), (-8.0, 7.0)]
    """
    half = _floor(2.0 ** (_checked(bit_width) - 1))
    return (1 - half if narrow else -half), half - 1


def symmetric_scale(clip: Tensor, bit_width: Width) -> Tensor:
    """S of eq. 1 from the clip (max|W|, or a smaller one): clip / (2^(b-1) - 1). Shape and dtype of ``clip``."""
    return clip / _like(2.0 ** (_checked(bit_width) - 1) - 1, clip)


def fake_quantize(
    weight: Tensor, clip: Tensor, bit_width: Width, *, narrow: bool = False, rounding: Rounding = HARD
) -> Tensor:
    """Symmetric fake quantization, eq. 1: quantize to the grid of ``bit_width`` and dequantize, in float.

    Args:
        weight: any float shape.
        clip: the real value that reaches 2^(b-1) - 1, positive, the dtype of ``weight``, broadcastable to it.
        bit_width: real number of bits, or a scalar tensor to receive a gradient (its owner keeps it from 2 to 16).

    Returns:
        Same shape and dtype as ``weight``. Differentiable in weight, clip and bit width.

    >>> w = torch.tensor([0.9, -1.0, 0.31])
    >>> fake_quantize(w, w.abs().amax(), 4)        # S = 1/7, codes 6, -7, 2
    tensor([ 0.8571, -1.0000,  0.2857])
    """
    low, high = grid(bit_width, narrow=narrow)
    return _FakeQuantize.apply(weight, symmetric_scale(clip, bit_width), low, high, rounding)


def fake_quantize_affine(
    weight: Tensor, low: Tensor, high: Tensor, bit_width: Width, *, rounding: Rounding = HARD
) -> Tensor:
    """Affine fake quantization, eq. 2, with codes 0 .. floor(2^b) - 1.

    Args:
        weight: any float shape.
        low: w_min, broadcastable to ``weight``.
        high: w_max, above ``low``.
        bit_width: as ``fake_quantize``.

    >>> w = torch.tensor([-1.0, 0.25, 1.0])
    >>> fake_quantize_affine(w, w.amin(), w.amax(), 3)     # S = 2/8, codes 0, 5, 7 (8 is clipped)
    tensor([-1.0000,  0.2500,  0.7500])
    """
    levels = 2.0 ** _checked(bit_width)
    scale = (high - low) / _like(levels, low)
    return _FakeQuantize.apply(weight - low, scale, 0.0, _floor(levels) - 1, rounding) + low


def quantize(weight: Tensor, scale: Tensor, bit_width: float, *, narrow: bool = False) -> Tensor:
    """The integer codes of ``weight`` on the symmetric grid: clip(round(weight / scale)).

    Returns:
        int8, the shape of ``weight``. At most 8 bits.
    """
    if bit_width > 8:
        raise ValueError(f"codes of {bit_width} bits do not fit int8; at most 8 bits can be stored.")
    low, high = grid(bit_width, narrow=narrow)
    return torch.clamp(weight / scale, low, high).round_().to(torch.int8)


def soft_round(steps: Tensor, softness: float) -> Tensor:
    """The soft staircase: round, except that values within softness/2 of a threshold keep a fraction.

    With r = v - round(v):   round(v) + sign(r) * max(0, |r| - (1 - softness)/2) / softness.
    Continuous; the identity at softness 1; ``round`` at 0.

    >>> soft_round(torch.tensor([2.0, 2.2, 2.45, 2.55]), 0.2)
    tensor([2.0000, 2.0000, 2.2500, 2.7500])
    """
    nearest = torch.round(steps)
    if softness == 0.0:
        return nearest
    rise = torch.nn.functional.softshrink(steps - nearest, (1 - softness) / 2)
    rise.clamp_(-softness / 2, softness / 2)  # rounding errors, which the division would magnify
    return nearest.add_(rise, alpha=1 / softness)


def pass_inside(grad: Tensor, steps: Tensor, low: float, high: float) -> Tensor:
    """The gradient of clipping: ``grad`` where ``steps`` lies within [low, high], 0 elsewhere.

    A quotient that should equal a bound may miss it by its two roundings: max|W| / S is above 7 in one of twelve
    rows. It is inside.
    """
    slack = 2 * torch.finfo(steps.dtype).eps * max(-low, high)
    # one pass over the data, where a mask takes five; its bounds themselves count as outside
    return torch.ops.aten.hardtanh_backward(grad, steps, low - slack, high + slack)


class _FakeQuantize(torch.autograd.Function):
    """W_b = S * Q,  Q = round(clip(v, low, high)),  v = W / S, and its gradient for a gradient g of W_b.

        dL/dW     g                      inside the grid, 0 where clipped
        dL/dS     sum of g * (Q - v)     inside;          sum of g * bound where clipped: the gradient of LSQ
        dL/dhigh  sum of g * S           over the codes clipped there; low likewise

    Within the grid, g on its way through ``round`` is compensated as ``Rounding`` says.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, low: Width, high: Width, rounding: Rounding) -> Tensor:
        ctx.low, ctx.high, ctx.rounding = float(low), float(high), rounding
        steps = (weight / scale).clamp_(ctx.low, ctx.high)
        on_grid = soft_round(steps, rounding.softness).mul_(scale)
        ctx.save_for_backward(weight, scale, on_grid)  # all of them alive anyway: a training step holds no copy of v
        return on_grid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, on_grid = ctx.saved_tensors
        low, high, rounding = ctx.low, ctx.high, ctx.rounding
        steps = weight / scale
        through = pass_inside(grad, steps, low, high)
        if rounding.slope and rounding.softness:
            through = through * (_rest(steps).abs() > (1 - rounding.softness) / 2) / rounding.softness
        if rounding.ewgs:
            through = through + rounding.ewgs * through.abs() * _rest(steps)

        grad_weight, grad_scale, grad_low, grad_high = through, None, None, None
        if rounding.dampening:
            grad_weight = through + pass_inside(2 * rounding.dampening * scale * _rest(steps), steps, low, high)
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * on_grid).sub_(through * weight).sum_to_size(scale.shape) / scale
        if ctx.needs_input_grad[2]:
            grad_low = torch.where(steps < low, grad * scale, 0).sum()
        if ctx.needs_input_grad[3]:
            grad_high = torch.where(steps > high, grad * scale, 0).sum()
        return grad_weight, grad_scale, grad_low, grad_high, None


def _rest(steps: Tensor) -> Tensor:
    return steps - steps.round()


def _checked(bit_width: Width) -> Width:
    """A width that is a parameter is not looked at: that would wait for its device."""
    return bit_width if isinstance(bit_width, Tensor) else check_bit_width(bit_width)


def _floor(value: Width) -> Width:
    """Floor, with derivative 1 (STE)."""
    return value + (value.floor() - value).detach() if isinstance(value, Tensor) else float(math.floor(value))


def _like(value: Width, other: Tensor) -> Width:
    """A width's tensor with the dtype and device of ``other``; a float as it is."""
    return value.to(other) if isinstance(value, Tensor) else value
