"""How values are rounded to the grid on the way forward, and what passes on the way back: one object a form.

Both get values in steps of the grid, v = W / S. Backward is the straight-through estimator (STE): ``round`` counts as
having derivative 1, corrected by element-wise gradient scaling where ``ewgs`` is above 0 (Lee, Kim and Ham, CVPR 2021,
arXiv 2104.00903, eq. 4):

    g  ->  g * (1 + ewgs * sign(g) * (v - round(v)))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rounding(Protocol):
    """A form of rounding: frozen, so that two of the same values are equal."""

    @property
    def hard(self) -> bool:
        """True if ``forward`` gives whole numbers only, as what is stored needs."""

    def forward(self, steps: Tensor) -> Tensor:
        """The place on the grid of each of ``steps`` (any float shape, within the grid): a new tensor like it."""

    def backward(self, grad: Tensor, steps: Tensor) -> Tensor:
        """The gradient of ``steps`` from that of the output; ``grad`` is 0 where a value lies beyond the grid."""


@dataclass(frozen=True)
class HardRounding:
    """To the nearest whole number, ties to even.

    Attributes:
        ewgs: strength of the gradient's scaling, in 1/steps, at least 0.

    Raises:
        ValueError: ``ewgs`` out of range.
    """

    ewgs: float = 0.0

    def __post_init__(self) -> None:
        _check_ewgs(self.ewgs)

    @property
    def hard(self) -> bool:
        return True

    def forward(self, steps: Tensor) -> Tensor:
        return torch.round(steps)

    def backward(self, grad: Tensor, steps: Tensor) -> Tensor:
        return _straight_through(grad, steps, self.ewgs)


@dataclass(frozen=True)
class SoftStaircase:
    """Round, except that values within softness/2 of a rounding threshold keep a fraction.

    With r = v - round(v):   round(v) + sign(r) * max(0, |r| - (1 - softness)/2) / softness.
    Continuous; the grid points never move.

    Attributes:
        softness: from 0, which is ``HardRounding``, to 1, the float value.
        ewgs: as ``HardRounding``.

    Raises:
        ValueError: a value out of range.

    >>> SoftStaircase(0.2).forward(torch.tensor([2.0, 2.2, 2.45, 2.55]))
    tensor([2.0000, 2.0000, 2.2500, 2.7500])
    """

    softness: float
    ewgs: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.softness <= 1.0:
            raise ValueError(f"softness is {self.softness}; it must be within 0 (hard grid) and 1 (float).")
        _check_ewgs(self.ewgs)

    @property
    def hard(self) -> bool:
        return self.softness == 0.0

    def forward(self, steps: Tensor) -> Tensor:
        nearest = torch.round(steps)
        if self.hard:
            return nearest
        rise = torch.nn.functional.softshrink(steps - nearest, (1 - self.softness) / 2)
        rise.clamp_(-self.softness / 2, self.softness / 2)  # rounding errors, which the division would magnify
        return nearest.add_(rise, alpha=1 / self.softness)

    def backward(self, grad: Tensor, steps: Tensor) -> Tensor:
        return _straight_through(grad, steps, self.ewgs)


def _check_ewgs(ewgs: float) -> None:
    if not (math.isfinite(ewgs) and ewgs >= 0):
        raise ValueError(f"ewgs is {ewgs}; it must be a finite number of at least 0.")


def _straight_through(grad: Tensor, steps: Tensor, ewgs: float) -> Tensor:
    return grad + ewgs * grad.abs() * (steps - steps.round()) if ewgs else grad


HARD = HardRounding()
