"""The equation: fake quantization at a real-valued bit width, and its gradient.

Source: "FraQAT: Quantization Aware Training with Fractional bits", arXiv 2510.14823, equation 1:

    S = max|W| / (2^(b-1) - 1)      Q = round(W / S)      W_b = S * Q

Nothing in it needs the bit width ``b`` to be an integer. Codes are clipped to the grid of that width: [-32, 31] at 6
bits, [-22, 21] at 5.5, [-16, 15] at 5 (``grid``). In place of max|W| a smaller clip can stand (``clip.py``).

The gradient passes the rounding by a straight-through estimator: ``round`` counts as having derivative 1, and what
follows from that by the chain rule is exact (``_FakeQuantize``). A clipped code passes nothing to its weight; a
learned clip gets the gradient of LSQ (arXiv 1902.08153); the bit width gets one too.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.rounding import NEAREST, Rounding

# A bit width, or what is computed from one: a number, or a scalar tensor that is being trained.
Width = TypeVar("Width", float, Tensor)

MIN_BIT_WIDTH = 2.0
MAX_BIT_WIDTH = 16.0


def check_bit_width(bit_width: float) -> float:
    """Return ``bit_width`` as a float, or raise ValueError if it is not a number from 2 to 16."""
    if not (isinstance(bit_width, (int, float)) and MIN_BIT_WIDTH <= bit_width <= MAX_BIT_WIDTH):
        raise ValueError(
            f"bit width is {bit_width!r}; it must be a number from {MIN_BIT_WIDTH:g} to {MAX_BIT_WIDTH:g}."
        )
    return float(bit_width)


def grid(bit_width: Width) -> tuple[Width, Width]:
    """The smallest and largest code of a bit width: floats, or tensors if the width is one.

    The bounds of a tensor that requires grad carry the gradient of 2^(b-1) (STE for floor).

    >>> [grid(b) for b in (6, 5.5, 5, 4.25, 4)]
    [(-32.0, 31.0), (-22.0, 21.0), (-16.0, 15.0), (-9.0, 8.0), (-8.0, 7.0)]
    """
    half = _floor(2.0 ** (_checked(bit_width) - 1))
    return -half, half - 1


def symmetric_scale(clip: Tensor, bit_width: Width) -> Tensor:
    """S of eq. 1 from the clip (max|W|, or a smaller one): clip / (2^(b-1) - 1). Shape and dtype of ``clip``."""
    return clip / _like(2.0 ** (_checked(bit_width) - 1) - 1, clip)


def fake_quantize(weight: Tensor, clip: Tensor, bit_width: Width, *, rounding: Rounding = NEAREST) -> Tensor:
    """Quantize to the grid of ``bit_width`` and dequantize, in float.

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
    low, high = grid(bit_width)
    return _FakeQuantize.apply(weight, symmetric_scale(clip, bit_width), low, high, rounding)


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

    Within the grid, g on its way through ``round`` is what ``rounding.backward`` makes of it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, low: Width, high: Width, rounding: Rounding) -> Tensor:
        ctx.low, ctx.high, ctx.rounding = float(low), float(high), rounding
        on_grid = torch.empty_like(weight)
        for rows in _parts(weight, scale):
            part = torch.div(weight[rows], scale[rows], out=on_grid[rows]).clamp_(ctx.low, ctx.high)
            torch.mul(rounding.forward(part), scale[rows], out=part)
        ctx.save_for_backward(weight, scale, on_grid)  # all of them alive anyway: a training step holds no copy of v
        return on_grid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, on_grid = ctx.saved_tensors
        low, high, rounding = ctx.low, ctx.high, ctx.rounding

        def of(rows: Any) -> tuple[Tensor, Tensor | None]:
            part, own, passed = weight[rows], scale[rows], grad[rows]
            steps = part / own
            through = rounding.backward(pass_inside(passed, steps, low, high), steps)
            if not ctx.needs_input_grad[1]:
                return through, None
            return through, (passed * on_grid[rows]).sub_(through * part).sum_to_size(own.shape) / own

        parts = _parts(weight, scale)
        if len(parts) == 1:
            through, grad_scale = of(parts[0])
        else:  # written where they belong: joining them would take as long again
            through, grad_scale = torch.empty_like(weight), torch.empty_like(scale) if ctx.needs_input_grad[1] else None
            for rows in parts:
                through[rows], of_scale = of(rows)
                if grad_scale is not None and of_scale is not None:
                    grad_scale[rows] = of_scale
        grad_low, grad_high = None, None
        if ctx.needs_input_grad[2]:
            grad_low = torch.where(weight / scale < low, grad * scale, 0).sum()
        if ctx.needs_input_grad[3]:
            grad_high = torch.where(weight / scale > high, grad * scale, 0).sum()
        return through, grad_scale, grad_low, grad_high, None


# Bytes of a weight that a CPU quantizes at a time: what comes in between stays in its cache.
_CACHED = 2**20


def _parts(weight: Tensor, scale: Tensor) -> list[Any]:
    """Rows of a weight that are computed one after the other; all of them at once but on a CPU."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"  # no fake, no shared-out tensor
    by_row = scale.ndim == weight.ndim and scale.shape[:1] == weight.shape[:1]
    if not plain or not by_row or weight.nbytes <= _CACHED:
        return [...]
    count = max(1, len(weight) * _CACHED // weight.nbytes)
    return [slice(first, first + count) for first in range(0, len(weight), count)]


def _checked(bit_width: Width) -> Width:
    """A width that is a parameter is not looked at: that would wait for its device."""
    return bit_width if isinstance(bit_width, Tensor) else check_bit_width(bit_width)


def _floor(value: Width) -> Width:
    """Floor, with derivative 1 (STE)."""
    return value + (value.floor() - value).detach() if isinstance(value, Tensor) else float(math.floor(value))


def _like(value: Width, other: Tensor) -> Width:
    """A width's tensor with the dtype and device of ``other``; a float as it is."""
    return value.to(other) if isinstance(value, Tensor) else value
