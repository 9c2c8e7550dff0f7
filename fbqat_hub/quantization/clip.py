"""Where a weight is clipped: one object a way to find the clip, with ``value`` and ``on_width``.

A weight comes as [..., n], n values that share a scale; its clip is [..., 1], the real value that reaches the largest
code. ``CLIPS`` has the objects by the names that configs and recipes use.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.fake_quantize import grid, symmetric_scale

# A zero row would give a scale of 0 and codes of 0/0.
TINY_CLIP = 1e-8

# Values searched at a time, so that a row's 69 looks find it in the cache (2^16 x 4 bytes = 256 KiB).
_BLOCK = 2**16


class Clip(nn.Module, ABC):
    """The clip of one weight.

    Args:
        grouped: the weight, fp32 [..., n].
    """

    def __init__(self, grouped: Tensor) -> None:
        super().__init__()

    @abstractmethod
    def value(self, grouped: Tensor, bit_width: float) -> Tensor:
        """The clip [..., 1] of the weight as it is now, positive; carries a gradient where it is learned."""

    def on_width(self, grouped: Tensor, bit_width: float) -> list[nn.Parameter]:
        """Called when the weight's bit width changes to ``bit_width``.

        Returns:
            The parameters that were set anew: what an optimizer remembers of their past does not hold any more.
        """
        return []


class MaxAbs(Clip):
    """max|W|, from the weight at each forward: the paper's."""

    def value(self, grouped: Tensor, bit_width: float) -> Tensor:
        return max_abs(grouped)


class LeastSquares(Clip):
    """The clip with the least squared error, searched when the bit width changes: one right at 8 bits is wrong at 4.

    Attributes:
        found: fp32 buffer [..., 1].
    """

    found: Tensor

    def __init__(self, grouped: Tensor) -> None:
        super().__init__(grouped)
        self.register_buffer("found", max_abs(grouped))

    def value(self, grouped: Tensor, bit_width: float) -> Tensor:
        return self.found

    def on_width(self, grouped: Tensor, bit_width: float) -> list[nn.Parameter]:
        self.found.copy_(mse_clip(grouped, bit_width))
        return []


class Learned(Clip):
    """Starts at the clip with the least squared error at each bit width, then trained: LSQ, arXiv 1902.08153.

    Attributes:
        log_clip: parameter [..., 1], the logarithm of the clip. In the logarithm a step of Adam is relative, whatever
            the size of the weights.
    """

    def __init__(self, grouped: Tensor) -> None:
        super().__init__(grouped)
        self.log_clip = nn.Parameter(max_abs(grouped).log())

    def value(self, grouped: Tensor, bit_width: float) -> Tensor:
        # LSQ's gradient scale, 1 / sqrt(values per scale * largest code), section 2.2
        _, largest_code = grid(bit_width)
        factor = 1 / math.sqrt(grouped.numel() / self.log_clip.numel() * largest_code)
        fixed = self.log_clip.detach()
        return (fixed + (self.log_clip - fixed) * factor).exp()

    def on_width(self, grouped: Tensor, bit_width: float) -> list[nn.Parameter]:
        with torch.no_grad():
            self.log_clip.copy_(mse_clip(grouped, bit_width).log())
        return [self.log_clip]


CLIPS: dict[str, type[Clip]] = {"max_abs": MaxAbs, "mse": LeastSquares, "learned": Learned}


def max_abs(grouped: Tensor) -> Tensor:
    """max|W| over the last dimension, kept: [..., n] -> [..., 1]."""
    return grouped.detach().abs().amax(-1, keepdim=True).clamp_min(TINY_CLIP)


@torch.no_grad()
def mse_clip(grouped: Tensor, bit_width: float) -> Tensor:
    """The clip with the least mean squared error at this bit width, searched per row.

    A coarse search over the ratios 1.2, 1.18, ... 0.02 of max|W| (above 1 can pay, for it moves the grid; rows with
    outliers want little), then 9 finer ones within 0.016 of the best.

    Args:
        grouped: [..., n], one clip for each row of n values.

    Returns:
        [..., 1], positive, same dtype.
    """
    rows = grouped.reshape(-1, grouped.shape[-1])
    blocks = rows.split(max(1, _BLOCK // rows.shape[-1]))
    return torch.cat([_search(block, bit_width) for block in blocks]).view(*grouped.shape[:-1], 1)


def _search(rows: Tensor, bit_width: float) -> Tensor:
    low, high = grid(bit_width)
    largest = max_abs(rows)

    def error(clip: Tensor) -> Tensor:
        scale = symmetric_scale(clip, bit_width)
        steps = rows / scale
        return torch.linalg.vector_norm(steps.clamp(low, high).round_().sub_(steps), dim=-1, keepdim=True) * scale

    def best(centre: Tensor, offsets: list[float]) -> Tensor:
        best_clip, best_error = centre, torch.full_like(centre, float("inf"))
        for offset in offsets:
            clip = centre + offset * largest
            clip_error = error(clip)
            best_clip = torch.where(clip_error < best_error, clip, best_clip)
            best_error = torch.minimum(clip_error, best_error)
        return best_clip

    coarse = best(largest, [step / 50 for step in range(10, -50, -1)])
    return best(coarse, [step / 250 for step in range(-4, 5)])
