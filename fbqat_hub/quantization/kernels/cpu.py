"""The packed matmul on x86 CPUs: oneDNN's u8 x s8 kernel, exact in its integer part.

The weight is unpacked once to oneDNN's int8 layout and kept beside the packed one: 8 more bits a weight in memory.
The integer part is exact up to 2^31 / (255 * 128) = 65,793 inputs, where 32-bit sums end.

Activations must reach oneDNN as *unsigned* bytes: for int8 ones it has no fast kernel on AVX-512 and falls back to its
reference loop (7 s instead of 2 ms for 256 x 1152 x 1152). A symmetric code c is therefore passed as c + 128 with
zero_point 128. Without VNNI, the wide integer dot product, two u8 x s8 products are summed in 16 bits. Codes of up to
7 bits cannot saturate it (2 x 255 x 64 = 32,640 < 32,767); codes of 8 bits can, and are left to the reference there.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fbqat_hub.quantization.activation import TINY_ACTIVATION, largest_magnitude
from fbqat_hub.quantization.packing import unpack
from fbqat_hub.quantization.scheme import ActivationScheme


class PreparedWeight(NamedTuple):
    """A weight in oneDNN's own layout.

    Attributes:
        codes: int8, opaque (mkldnn) layout of [in, out].
        scale: fp32 [out].
        zero_point: int32 [out], zeros.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def is_supported(weight_scale: Tensor, scheme: ActivationScheme, weight_bits: int) -> bool:
    """True where this kernel applies: x86 with AVX2 (8-bit weights: VNNI), per-channel scales, 8-bit activations."""
    return (
        weight_scale.device.type == "cpu"
        and weight_scale.dim() == 1
        and scheme.bits == 8
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and (weight_bits < 8 or _has_exact_sums())
    )


@cache
def _has_exact_sums() -> bool:
    """Whether oneDNN sums the largest u8 x s8 products without saturating. Asked of the kernel itself: which
    instructions it uses depends on the processor and on ONEDNN_MAX_CPU_ISA."""
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    largest = PreparedWeight(weight, torch.ones(16), torch.zeros(16, dtype=torch.int32))
    return bool((_integer_matmul(torch.full((1, 64), 255, dtype=torch.uint8), 0, largest) == 64 * 255 * 127).all())


def prepare_weight(weight_packed: Tensor, weight_scale: Tensor, in_features: int) -> PreparedWeight:
    """Unpack the codes of ``packing.pack``, once, into oneDNN's layout."""
    # qlinear_prepack ignores strides: a view, as unpack returns for an odd `in`, would give wrong codes silently.
    codes = unpack(weight_packed, in_features).contiguous()
    prepacked = torch.ops.onednn.qlinear_prepack(codes, None)
    return PreparedWeight(prepacked, weight_scale.contiguous(), torch.zeros_like(weight_scale, dtype=torch.int32))


def packed_linear_cpu(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """As ``packed_linear_reference``: [..., in] -> [..., out], equal to it but for the order of float roundings."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    # float -> int8 is vectorized in torch and float -> uint8 is not, so add 128 by flipping the top bit.
    if scheme.range == "static":
        assert input_scale is not None
        assert input_zero_point is not None
        zero_point = int(input_zero_point)
        shifted = torch.div(tokens, input_scale).round_().add_(zero_point - 128).clamp_(-128, 127)
        scale = input_scale
    else:
        zero_point = 128
        scale = largest_magnitude(tokens, scheme).clamp_min_(TINY_ACTIVATION).div_(127)
        shifted = torch.div(tokens, scale).round_()
    codes = shifted.to(torch.int8).view(torch.uint8).bitwise_xor_(128)
    y = _integer_matmul(codes, zero_point, weight)
    y = y.mul_(scale) if bias is None else torch.addcmul(bias.float(), y, scale)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def _integer_matmul(codes: Tensor, zero_point: int, weight: PreparedWeight) -> Tensor:
    """fp32 scale_w * (codes - zero_point) @ codes_w^T: the scale of x is given as 1, for each token has its own."""
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero_point, *weight, None, 1.0, 0, torch.float32, "none", [], ""
    )
