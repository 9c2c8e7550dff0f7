"""How values are rounded to the grid on the way forward, and what passes on the way back.

Both get values in steps of the grid, v = W / S. Backward is the straight-through estimator (STE): ``round`` counts as
having derivative 1, corrected by element-wise gradient scaling where ``ewgs`` is above 0 (Lee, Kim and Ham, CVPR 2021,
arXiv 2104.00903, eq. 4):

    g  ->  g * (1 + ewgs * sign(g) * (v - round(v)))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """To the nearest whole number, ties to even. Another form of rounding is a subclass with these two methods.

    Attributes:
        ewgs: strength of the gradient's scaling, in 1/steps, at least 0.

    Raises:
        ValueError: ``ewgs`` out of range.
    """

    ewgs: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ewgs) and self.ewgs >= 0):
            raise ValueError(f"ewgs is {self.ewgs}; it must be a finite number of at least 0.")

    def forward(self, steps: Tensor) -> Tensor:
        """The place on the grid of each of ``steps`` (any float shape, within the grid): a new tensor like it."""
        return torch.round(steps)

    def backward(self, grad: Tensor, steps: Tensor) -> Tensor:
        """The gradient of ``steps`` from that of the output; ``grad`` is 0 where a value lies beyond the grid."""
        return grad + self.ewgs * grad.abs() * (steps - steps.round()) if self.ewgs else grad


NEAREST = Rounding()
