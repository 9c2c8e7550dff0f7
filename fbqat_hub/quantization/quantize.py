"""From a float weight to what is stored, codes and scales: one function for training, quantize-on-load and export."""

from __future__ import annotations

import torch
from torch import Tensor

from fbqat_hub.quantization.clip import CLIPS, row_blocks
from fbqat_hub.quantization.fake_quantize import grid, symmetric_scale
from fbqat_hub.quantization.scheme import WeightScheme


@torch.no_grad()
def quantize_weight(
    weight: Tensor, scheme: WeightScheme, *, clip: Tensor | None = None, bit_width: float | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight; real = scale * code.

    Rows are taken some at a time, so that beside the weight and its codes there is no memory of their size.

    Args:
        weight: [out, in], or [out, in, 1, 1] of a 1x1 convolution; any float dtype. It is not changed.
        scheme: its ``clip`` says how the clip is found where none is given ("learned" starts at "mse").
        clip: fp32, one for each scale, broadcastable to ``grouped(weight, scheme)``, e.g. a trained one.
        bit_width: of the grid, ``scheme.bits`` if None.

    Returns:
        codes: int8 [out, in].
        scales: fp32 [out], or [out, groups] for per-group scales. A per-tensor scale is repeated for every output.

    Raises:
        ValueError: a weight that is empty or not finite, more than 8 bits, or a group size that does not suit it.

    >>> quantize_weight(torch.tensor([[0.875, -0.5, 0.2]]), WeightScheme(bits=4))
    (tensor([[ 7, -4,  2]], dtype=torch.int8), tensor([0.1250]))
    """
    bit_width = scheme.bits if bit_width is None else bit_width
    if not weight.numel():
        raise ValueError(f"the weight has shape {tuple(weight.shape)}: there is nothing to quantize.")
    weight = weight.flatten(1)
    if scheme.granularity == "per_tensor":
        return _quantized(weight, scheme, clip, bit_width)
    parts = row_blocks(weight)
    clips: list[Tensor | None] = [None] * len(parts)
    if clip is not None:
        groups = () if scheme.group_size is None else (group_count(scheme.group_size, weight.shape[1]),)
        clips = list(clip.expand(len(weight), *groups, 1).split(len(parts[0])))
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    for part, own, target in zip(parts, clips, codes.split(len(parts[0])), strict=True):
        found, scale = _quantized(part, scheme, own, bit_width)
        target.copy_(found)
        scales.append(scale)
    return codes, torch.cat(scales)


def _quantized(weight: Tensor, scheme: WeightScheme, clip: Tensor | None, bit_width: float) -> tuple[Tensor, Tensor]:
    """`quantize_weight` of rows [N, in], all at once."""
    rows = grouped(weight, scheme)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the weight has values that are not finite.")
    if clip is None:
        found = CLIPS[scheme.clip](rows)
        found.on_width(rows, bit_width)
        clip = found.value(rows, bit_width)
    scales = symmetric_scale(clip, bit_width)
    codes = quantize(rows, scales, bit_width).view(weight.shape)
    if scheme.granularity == "per_group":
        return codes, scales.squeeze(-1)
    return codes, scales.reshape(-1).expand(len(weight)).contiguous()


def quantize(values: Tensor, scale: Tensor, bit_width: float) -> Tensor:
    """The codes of ``values`` on the grid of a bit width: round(clip(values / scale)).

    Returns:
        int8, the shape of ``values``. At most 8 bits.
    """
    if bit_width > 8:
        raise ValueError(f"codes of {bit_width} bits do not fit int8; at most 8 bits can be stored.")
    low, high = grid(bit_width)
    return torch.clamp(values / scale, low, high).round_().to(torch.int8)


def grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """A weight [out, in] or [out, in, 1, 1] as fp32 [..., values that share a scale]; a view if it is fp32.

    Raises:
        ValueError: as ``group_count``.
    """
    weight = weight.float()
    if scheme.granularity == "per_tensor":
        return weight.reshape(1, -1)
    out_features, in_features = weight.shape[:2]
    if scheme.group_size is None:
        return weight.reshape(out_features, in_features)
    return weight.reshape(out_features, group_count(scheme.group_size, in_features), -1)


def group_count(group_size: int, in_features: int) -> int:
    """Scales of one output with per-group scales.

    A layer with no more inputs than a group has one. Where ``group_size`` does not divide the inputs, their groups are
    smaller, by less than half: of the largest even size that does.

    Raises:
        ValueError: there is no such size.

    >>> group_count(32, 320), group_count(32, 16), group_count(32, 400)  # of 32, 16 and 20 inputs
    (10, 1, 20)
    """
    if in_features <= group_size:
        return 1
    for size in range(group_size, group_size // 2 - 1, -2):
        if in_features % size == 0:
            return in_features // size
    raise ValueError(
        f"group_size {group_size} does not suit the layer's {in_features} inputs: no even number from "
        f"{group_size // 2} to {group_size} divides them."
    )
