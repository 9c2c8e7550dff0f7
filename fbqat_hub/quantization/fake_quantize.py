"""The equation: fake quantization at a real-valued bit width, and its gradient.

Source: "FraQAT: Quantization Aware Training with Fractional bits", arXiv 2510.14823, equations 1 and 2.

    symmetric (eq. 1)   S = max|W| / (2^(b-1) - 1)      Q = round(W / S)              W_b = S * Q
    affine    (eq. 2)   S = (w_max - w_min) / 2^b       Q = round((W - w_min) / S)    W_b = S * Q + w_min

Nothing in either form needs the bit width ``b`` to be an integer. Codes are clipped to the grid of that
width: [-32, 31] at 6 bits, [-22, 21] at 5.5, [-16, 15] at 5 (``grid``).

Everything here is plain differentiable torch. The only invented derivative is that of ``round``, which is
1 (the straight-through estimator). What follows from it by the chain rule is exact: no gradient where a
code is clipped, the gradient of LSQ (arXiv 1902.08153) for a learned clip, and a gradient for the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
        dampening: strength of oscillation dampening, added to the gradient of v in steps (Nagel et al.,
            ICML 2022, arXiv 2203.08797, eq. 6): the gradient of dampening/2 * (v - round(v))^2. 0 is off.
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
    """Return ``bit_width`` as a float, or raise ValueError if it is not within 2 and 16."""
    if not (math.isfinite(bit_width) and MIN_BIT_WIDTH <= bit_width <= MAX_BIT_WIDTH):
        raise ValueError(f"bit width is {bit_width}; it must be a number from {MIN_BIT_WIDTH:g} to {MAX_BIT_WIDTH:g}.")
    return float(bit_width)


def grid(bit_width: float | Tensor, *, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest and largest code of the symmetric grid, as float64 scalars (float dtype of a tensor width).

    Args:
        bit_width: b. If a tensor that requires grad, the bounds carry the gradient of 2^(b-1) (STE for floor).
        narrow: leave out the most negative code, so that the grid is symmetric about 0.

    >>> [tuple(int(q) for q in grid(b)) for b in (6, 5.5, 5, 4.25, 4)]
    [(-32, 31), (-22, 21), (-16, 15), (-9, 8), (-8, 7)]
    """
    half = 2.0 ** (_as_tensor(bit_width) - 1)
    half = half + (half.floor() - half).detach()
    return (-(half - 1) if narrow else -half), half - 1


def symmetric_scale(clip: Tensor, bit_width: float | Tensor) -> Tensor:
    """S of eq. 1 from the clip (max|W|, or a smaller one): clip / (2^(b-1) - 1). Shape and dtype of ``clip``."""
    steps = 2.0 ** (_as_tensor(bit_width) - 1) - 1
    return clip / steps.to(clip.dtype)


def fake_quantize(
    weight: Tensor, clip: Tensor, bit_width: float | Tensor, *, narrow: bool = False, rounding: Rounding = HARD
) -> Tensor:
    """Symmetric fake quantization, eq. 1: quantize to the grid of ``bit_width`` and dequantize, in float.

    Args:
        weight: any float shape.
        clip: the real value that reaches 2^(b-1) - 1, positive, broadcastable to ``weight``.
        bit_width: real number of bits, or a scalar tensor to receive a gradient.

    Returns:
        Same shape and dtype as ``weight``. Differentiable in weight, clip and bit width.

    >>> w = torch.tensor([0.9, -1.0, 0.31])
    >>> fake_quantize(w, w.abs().amax(), 4)        # S = 1/7, codes 6, -7, 2
    tensor([ 0.8571, -1.0000,  0.2857])
    """
    scale = symmetric_scale(clip, bit_width)
    low, high = (bound.to(weight.dtype) for bound in grid(bit_width, narrow=narrow))
    steps = torch.clamp(weight / scale, low, high)
    return _round(steps, rounding) * scale


def fake_quantize_affine(
    weight: Tensor, low: Tensor, high: Tensor, bit_width: float | Tensor, *, rounding: Rounding = HARD
) -> Tensor:
    """Affine fake quantization, eq. 2, with codes 0 .. floor(2^b) - 1.

    Args:
        weight: any float shape.
        low: w_min, broadcastable to ``weight``.
        high: w_max, above ``low``.

    >>> w = torch.tensor([-1.0, 0.25, 1.0])
    >>> fake_quantize_affine(w, w.amin(), w.amax(), 3)     # S = 2/8, codes 0, 5, 7 (8 is clipped)
    tensor([-1.0000,  0.2500,  0.7500])
    """
    levels = 2.0 ** _as_tensor(bit_width)
    scale = (high - low) / levels.to(weight.dtype)
    top = levels + (levels.floor() - levels).detach() - 1
    steps = torch.clamp((weight - low) / scale, torch.zeros((), dtype=weight.dtype), top.to(weight.dtype))
    return _round(steps, rounding) * scale + low


def quantize(weight: Tensor, scale: Tensor, bit_width: float, *, narrow: bool = False) -> Tensor:
    """The integer codes of ``weight`` on the symmetric grid: clip(round(weight / scale)).

    Returns:
        int8, the shape of ``weight``. At most 8 bits.
    """
    if bit_width > 8:
        raise ValueError(f"codes of {bit_width} bits do not fit int8; at most 8 bits can be stored.")
    low, high = (bound.to(weight.dtype) for bound in grid(bit_width, narrow=narrow))
    return torch.round(torch.clamp(weight / scale, low, high)).to(torch.int8)


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
    rest = steps - nearest
    return nearest + torch.sign(rest) * torch.relu(rest.abs() - (1 - softness) / 2) / softness


class _Round(torch.autograd.Function):
    """``soft_round`` whose derivative is 1 (STE), compensated as ``Rounding`` says."""

    @staticmethod
    def forward(ctx, steps: Tensor, rounding: Rounding) -> Tensor:  # type: ignore[override]
        ctx.rounding = rounding
        if rounding.ewgs or rounding.dampening or (rounding.slope and rounding.softness):
            ctx.save_for_backward(steps)
        return soft_round(steps, rounding.softness)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        rounding: Rounding = ctx.rounding
        if not ctx.saved_tensors:
            return grad, None
        (steps,) = ctx.saved_tensors
        rest = steps - torch.round(steps)
        if rounding.slope and rounding.softness:
            grad = grad * (rest.abs() > (1 - rounding.softness) / 2) / rounding.softness
        if rounding.ewgs:
            grad = grad * (1 + rounding.ewgs * torch.sign(grad) * rest)
        if rounding.dampening:
            grad = grad + rounding.dampening * rest
        return grad, None


def _round(steps: Tensor, rounding: Rounding) -> Tensor:
    return _Round.apply(steps, rounding)


def _as_tensor(bit_width: float | Tensor) -> Tensor:
    if isinstance(bit_width, Tensor):
        return bit_width
    return torch.tensor(check_bit_width(bit_width), dtype=torch.float64)
