"""The packed matmul on CPUs: which kernel computes it, and oneDNN's u8 x s8 one, exact in its integer part.

| processor | fast (default) | small memory |
|---|---|---|
| x86 with AVX2, AVX-VNNI or AVX-512 VNNI; ARM with dot products | ``native.py`` | ``native.py`` |
| x86 with AMX | oneDNN, its int8 weight kept | ``native.py`` |
| x86 without a C compiler | oneDNN, its int8 weight kept | oneDNN, its int8 weight made at each call |
| any other | ``reference.py``, in fp32 | the same |

Groups of inputs with a scale each are left to ``native.py``, where a group is a multiple of 32 inputs, else to
``reference.py``.

For oneDNN the weight is unpacked to its own int8 layout and kept beside the packed one (``memory.py``): 8 more bits a
weight in memory. It is an opaque tensor, which a traced operator cannot take as an argument.

The integer part is exact up to 2^31 / (255 * 128) = 65,793 inputs, where 32-bit sums end; layers of more take the
reference.

Activations must reach oneDNN as *unsigned* bytes: for int8 ones it has no fast kernel on AVX-512 and falls back to its
reference loop (7 s instead of 2 ms for 256 x 1152 x 1152). A symmetric code c is therefore passed as c + 128 with
zero_point 128. Without VNNI, oneDNN sums two u8 x s8 products in 16 bits. Codes of up to 7 bits cannot saturate it
(2 x 255 x 64 = 32,640 < 32,767); larger ones can, and are left to the reference there.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fbqat_hub.processor import instruction_sets
from fbqat_hub.quantization.activation import TINY_ACTIVATION, largest_magnitude, scale_or_nan
from fbqat_hub.quantization.kernels import memory, native
from fbqat_hub.quantization.kernels.reference import packed_linear_reference
from fbqat_hub.quantization.packing import unpack
from fbqat_hub.quantization.scheme import ActivationScheme

# int32 holds the sums of this many products of codes 0..255 with -128..127.
MAX_INPUTS = (2**31 - 1) // (255 * 128)


class PreparedWeight(NamedTuple):
    """A weight in oneDNN's own layout.

    Attributes:
        codes: int8, opaque (mkldnn) layout of [in, out].
        zero_point: int32 [out], zeros.
    """

    codes: Tensor
    zero_point: Tensor


def packed_linear_cpu(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """As ``packed_linear_reference``: [..., in] -> [..., out], equal to it but for the order of float roundings."""
    activation = (scheme, input_scale, input_zero_point)
    in_features = x.shape[-1]
    supported = x.numel() > 0 and is_supported(weight_scale, scheme, in_features)
    if supported and (weight_scale.dim() == 2 or _is_native()):
        memory.forget(weight_packed)
        return native.packed_linear_native(x, weight_packed, weight_scale, bias, *activation)
    weight = prepared(weight_packed, in_features) if supported else None
    if weight is None:
        return packed_linear_reference(x, weight_packed, weight_scale, bias, *activation)
    codes, scale, zero_point = _quantize(x.reshape(-1, in_features), *activation)
    y = _integer_matmul(codes, zero_point, weight, weight_scale)  # oneDNN takes one scale of x; each token has its own
    y = y.mul_(scale) if bias is None else torch.addcmul(bias.float(), y, scale, out=y)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def is_supported(weight_scale: Tensor, scheme: ActivationScheme, in_features: int) -> bool:
    """Where these kernels apply: 8-bit activations, sums that 32 bits hold, and a processor with a kernel for such
    scales. Groups, of multiples of 32 inputs, are left to the C kernel."""
    if scheme.bits != 8 or in_features > MAX_INPUTS:
        return False
    if weight_scale.dim() == 2:
        return native.takes(weight_scale, in_features) and native.load() is not None
    return _has_fast_products() or _is_native()


def _is_native() -> bool:
    """Whether the C kernel, which does not use AMX, is the one to take, and can be had."""
    return (memory.get_memory() == "small" or not _has_amx()) and native.load() is not None


def _has_amx() -> bool:
    return "amx_int8" in instruction_sets()


@cache
def _has_fast_products() -> bool:
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


@cache
def _has_exact_sums() -> bool:
    """Whether oneDNN sums the largest u8 x s8 products without saturating. Asked of the kernel itself: which
    instructions it uses depends on the processor and on ONEDNN_MAX_CPU_ISA."""
    largest = _prepack(torch.full((16, 64), 127, dtype=torch.int8))
    codes, ones = torch.full((1, 64), 255, dtype=torch.uint8), torch.ones(16, dtype=torch.float32)
    return bool((_integer_matmul(codes, 0, largest, ones) == 64 * 255 * 127).all())


def prepared(weight_packed: Tensor, in_features: int) -> PreparedWeight | None:
    """The codes of ``packing.pack`` in oneDNN's layout, made once unless memory is small; None where its sums could
    saturate."""
    if memory.get_memory() == "small":
        memory.forget(weight_packed)
        return _prepare(weight_packed, in_features)
    found: PreparedWeight | None = memory.keep(weight_packed, in_features, _prepare)
    return found


def _prepare(weight_packed: Tensor, in_features: int) -> PreparedWeight | None:
    # qlinear_prepack ignores strides: a view, as unpack returns for an odd `in`, would give wrong codes silently.
    codes = unpack(weight_packed, in_features).contiguous()
    narrow = weight_packed.dtype == torch.uint8 or not codes.numel() or (codes.min() >= -64 and codes.max() <= 63)
    return _prepack(codes) if narrow or _has_exact_sums() else None


def _prepack(codes: Tensor) -> PreparedWeight:
    return PreparedWeight(torch.ops.onednn.qlinear_prepack(codes, None), torch.zeros(len(codes), dtype=torch.int32))


def _quantize(
    tokens: Tensor, scheme: ActivationScheme, input_scale: Tensor | None, input_zero_point: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """As ``native.quantize``."""
    if native.load() is not None and tokens.dtype in native.DTYPES:  # one pass over x, not six
        return native.quantize(tokens, scheme, input_scale, input_zero_point)
    tokens = tokens.float()
    # float -> int8 is vectorized in torch and float -> uint8 is not, so add 128 by flipping the top bit.
    if scheme.range == "static":
        assert input_scale is not None
        assert input_zero_point is not None
        scale, zero_point = scale_or_nan(tokens, input_scale), int(input_zero_point)
        shifted = torch.div(tokens, input_scale).round_().add_(zero_point - 128).clamp_(-128, 127)
    else:
        scale, zero_point = largest_magnitude(tokens, scheme).clamp_min_(TINY_ACTIVATION).div_(127), 128
        shifted = torch.div(tokens, scale).round_()
        scale = scale.expand(len(tokens), 1)
    return shifted.to(torch.int8).view(torch.uint8).bitwise_xor_(128), scale, zero_point


def _integer_matmul(codes: Tensor, zero_point: int, weight: PreparedWeight, weight_scale: Tensor) -> Tensor:
    """fp32 scale_w * (codes - zero_point) @ codes_w^T."""
    return torch.ops.onednn.qlinear_pointwise(
        codes,
        1.0,
        zero_point,
        weight.codes,
        weight_scale.contiguous(),
        weight.zero_point,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
