"""Where a weight is clipped: one object a way to find the clip, with ``value`` and ``on_width``.

A weight comes as [..., n], n values that share a scale; its clip is [..., 1], the real value that reaches the largest
code. ``CLIPS`` has the objects by the names that configs and recipes use.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from fbqat_hub.quantization.fake_quantize import grid, symmetric_scale

# A zero row would give a scale of 0 and codes of 0/0.
TINY_CLIP = 1e-8

# Values that are worked on at a time: on a CPU what fits its cache (2^18 x 4 bytes = 1 MiB), on a GPU what keeps it
# busy.
_BLOCK, _GPU_BLOCK = 2**18, 2**22
# Values of a row that are summed at a time: torch splits a longer sum among threads, which would change its last bits.
_PIECE = 2**14
# Bins on each side of zero, the step between ratios of the clip to max|W| from 0.16 to 1.2, and how many there are
# below, each a factor above the last, from 0.012. Up to so many bits and above: a finer grid takes a finer look.
_FINE_ABOVE = 5.0
_COARSE, _FINE = (511, 0.01, 38), (1023, 0.005, 46)
_SMALLEST_RATIO, _EVEN_FROM, _LARGEST_RATIO = 0.012, 0.16, 1.2
# A row of so many times more values than bins is counted first; a shorter one looks each value up.
_COUNTED = 4
# What a value adds to an error is a multiple of this: float64 adds up 2^22 of them exactly, in any order.
_UNIT = 2.0**-30


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
    """The clip with the least mean squared error at this bit width, for each row.

    First each value, as a share of max|W|, is put into one of a thousand bins, and a table says what a value of the bin
    loses at each of 144 clips from 0.012 to 1.2 of max|W| (above 1 can pay, for it moves the grid; rows with outliers
    want little). Then the weight is rounded twice, at the best of these clips and at max|W|, and the scale is fitted to
    the codes Q of the better one by least squares, <W, Q> / <Q, Q>. Never worse than max|W|; within 0.1% of a search
    that rounds the weight at 69 clips (tests). The result does not depend on the number of threads.

    A row that is not finite gives a clip of no meaning.

    Args:
        grouped: [..., n], one clip for each row of n values.

    Returns:
        [..., 1], positive, same dtype.
    """
    blocks = row_blocks(grouped.reshape(-1, grouped.shape[-1]))
    return torch.cat([_search(block, bit_width) for block in blocks]).view(*grouped.shape[:-1], 1)


def row_blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [N, n] in the parts of which a device works on one at a time, the last perhaps smaller; views."""
    block = _BLOCK if rows.device.type == "cpu" else _GPU_BLOCK
    return rows.split(max(1, block // rows.shape[-1]))


def _search(rows: Tensor, bit_width: float) -> Tensor:
    values = rows.float()
    largest = max_abs(values)
    ratios, _, _ = _table(bit_width, rows.device)
    shares = values / largest
    best = ratios[_binned_errors(shares, bit_width).argmin(-1, keepdim=True)]
    share, error = _fitted(shares, best, bit_width)
    unclipped, its_error = _fitted(shares, torch.ones_like(best), bit_width)
    clip = torch.where(its_error < error, unclipped, share) * largest  # the bins may miss what one value loses
    return clip.clamp_(TINY_CLIP * _SMALLEST_RATIO, torch.finfo(clip.dtype).max).to(rows.dtype)


def _fitted(shares: Tensor, clip: Tensor, bit_width: float) -> tuple[Tensor, Tensor]:
    """The best clip [rows, 1] for the codes that ``clip`` gives, and the squared error of both."""
    low, high = grid(bit_width)
    scale = symmetric_scale(clip, bit_width)
    error, along, square = (torch.zeros_like(scale) for _ in range(3))
    for piece in shares.split(_PIECE, dim=-1):
        steps = piece / scale
        codes = steps.clamp(low, high).round_()
        rest = steps.sub_(codes)
        error += rest.square().sum(-1, keepdim=True)
        along += (rest * codes).sum(-1, keepdim=True)
        square += codes.square_().sum(-1, keepdim=True)
    move = along / square.clamp_min_(1)  # <W, Q> / <Q, Q> - 1, without the difference of two large sums
    return clip * (1 + move), (error - along * move) * scale**2


def _binned_errors(shares: Tensor, bit_width: float) -> Tensor:
    """The squared error of rows [rows, n] within -1 .. 1 at each ratio of ``_table``: [rows, ratios]."""
    _, exact, single = _table(bit_width, shares.device)
    count, values = shares.shape
    bins = len(single)
    # the clamp is for NaN: what comes of it is no number, but no index out of bounds either
    index = (shares * (bins // 2)).add_(bins // 2 + 0.5).to(torch.int32).clamp_(0, bins - 1)
    offsets = torch.arange(count, dtype=torch.int32, device=shares.device)
    if values < _COUNTED * bins or shares.device.type == "mps":  # that has no float64
        return embedding_bag(index.view(-1), single, offsets * values, mode="sum")
    index += (offsets * bins).view(-1, 1)
    return torch.bincount(index.view(-1), minlength=count * bins).view(count, bins).double() @ exact


@functools.lru_cache(maxsize=32)
def _table(bit_width: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a value in a bin loses at a clip.

    Bin j of 2 h + 1 has the values from (j - h - 1/2) / h to (j - h + 1/2) / h, so that -1, 0 and 1 are in the middle
    of one. An entry is the mean over the bin of (x - S Q)^2, by its integral: with v = x / S and k its code,
    k / 12 + (v - k)^3 / 3 is that of (v - k)^2, for each code before k has left 1/12.

    Returns:
        ratios: fp32 [ratios], of the clip to max|W|.
        exact: fp64 [bins, ratios], multiples of 2^-30; and the same in fp32.
    """
    half, step, below = _FINE if bit_width > _FINE_ABOVE else _COARSE
    float64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    factor = torch.linspace(math.log(_SMALLEST_RATIO), math.log(_EVEN_FROM), below + 1, **float64)[:-1].exp()
    even = torch.linspace(_EVEN_FROM, _LARGEST_RATIO, round((_LARGEST_RATIO - _EVEN_FROM) / step) + 1, **float64)
    largest_code = 2.0 ** (bit_width - 1) - 1
    edge = torch.tensor([largest_code / (largest_code + 0.5)], **float64)  # max|W| just reaches the largest code
    ratios = torch.cat([factor, even, edge])

    low, high = grid(bit_width)
    scale = symmetric_scale(ratios, bit_width)
    edges = (torch.arange(2 * half + 2, **float64).view(-1, 1) - half - 0.5) / half
    steps = edges / scale
    code = steps.round().clamp_(low, high)
    integral = code / 12 + (steps - code) ** 3 / 3
    exact = (integral.diff(dim=0) * scale**3 * half).div_(_UNIT).round_().mul_(_UNIT)
    single = exact.float().to(device)
    return ratios.float().to(device), exact if device.type == "mps" else exact.to(device), single
