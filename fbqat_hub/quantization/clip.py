"""Where a weight is clipped: the largest magnitude, or the clip with the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from fbqat_hub.quantization.fake_quantize import fake_quantize

# A zero row would give a scale of 0 and codes of 0/0.
TINY_CLIP = 1e-8


def max_abs(grouped: Tensor) -> Tensor:
    """max|W| over the last dimension, kept: [..., n] -> [..., 1]."""
    return grouped.detach().abs().amax(-1, keepdim=True).clamp_min(TINY_CLIP)


@torch.no_grad()
def mse_clip(grouped: Tensor, bit_width: float, *, narrow: bool = False) -> Tensor:
    """The clip with the least mean squared error at this bit width, searched per row.

    A coarse search over 51 ratios of max|W| from 0.2 to 1.2 (above 1 can pay, for it moves the grid), then 9 finer
    ones within 0.02 of the best.

    Args:
        grouped: [..., n], one clip for each row of n values.

    Returns:
        [..., 1], positive, same dtype.
    """
    largest = max_abs(grouped)

    def search(centre: Tensor, offsets: Tensor) -> Tensor:
        best_clip, best_error = centre, torch.full_like(centre, float("inf"))
        for offset in offsets.tolist():
            clip = (centre + offset * largest).clamp_min(TINY_CLIP)
            error = (fake_quantize(grouped, clip, bit_width, narrow=narrow) - grouped).square().mean(-1, keepdim=True)
            best_clip = torch.where(error < best_error, clip, best_clip)
            best_error = torch.minimum(error, best_error)
        return best_clip

    coarse = search(largest, torch.linspace(0.2, -0.8, 51))
    return search(coarse, torch.linspace(-0.016, 0.016, 9))
