"""Where a weight is clipped: the largest magnitude, or the clip with the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from fbqat_hub.quantization.fake_quantize import grid, symmetric_scale

# A zero row would give a scale of 0 and codes of 0/0.
TINY_CLIP = 1e-8

# Values searched at a time, so that a row's 69 looks find it in the cache (2^16 x 4 bytes = 256 KiB).
_BLOCK = 2**16


def max_abs(grouped: Tensor) -> Tensor:
    """max|W| over the last dimension, kept: [..., n] -> [..., 1]."""
    return grouped.detach().abs().amax(-1, keepdim=True).clamp_min(TINY_CLIP)


@torch.no_grad()
def mse_clip(grouped: Tensor, bit_width: float, *, narrow: bool = False) -> Tensor:
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
    return torch.cat([_search(block, bit_width, narrow) for block in blocks]).view(*grouped.shape[:-1], 1)


def _search(rows: Tensor, bit_width: float, narrow: bool) -> Tensor:
    low, high = grid(bit_width, narrow=narrow)
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
