"""The packed matmul on GPUs: int8 tensor cores through ``torch._int_mm``, else one product in the dtype of x.

Not measured: it was written without a GPU. Its arithmetic is plain torch, so that tests run the same functions on a CPU
and compare them with the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fbqat_hub.quantization.activation import fake_quantize_activation, quantize_activation
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.packing import unpack
from fbqat_hub.quantization.scheme import ActivationScheme

# what torch._int_mm asks for on CUDA: more than 16 rows, inner and outer sizes that 8 divides
MIN_ROWS = 17
MULTIPLE = 8


def suits_int8(weight_packed: Tensor, weight_scale: Tensor, scheme: ActivationScheme, in_features: int) -> bool:
    """True where int8 products apply: per-channel scales, 8-bit activations, sizes that ``torch._int_mm`` takes."""
    return (
        weight_scale.dim() == 1
        and scheme.bits == 8
        and in_features % MULTIPLE == 0
        and weight_packed.shape[0] % MULTIPLE == 0
    )


def packed_linear_gpu(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """As ``packed_linear_reference``: [..., in] -> [..., out], the dtype of x."""
    activation = (scheme, input_scale, input_zero_point)
    if x.numel() and suits_int8(weight_packed, weight_scale, scheme, x.shape[-1]):
        return int8_linear(x, weight_packed, weight_scale, bias, *activation)
    return dequantized_linear(x, weight_packed, weight_scale, bias, *activation)


def int8_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """scale_x * scale_w * (codes_x @ codes_w^T) + bias, summed exactly: int32 holds 131,071 = (2^31 - 1) / 2^14 inputs.

    A static code 0..255 is passed as code - 128, and so is its zero_point; what the zero_point adds to each output is
    taken off the sums: (q - z) @ w = q @ w - z * sum(w).
    """
    in_features = x.shape[-1]
    codes, scale, zero_point = quantize_activation(x.reshape(-1, in_features), scheme, input_scale, input_zero_point)
    static = scheme.range == "static"
    codes = (codes.sub_(128) if static else codes).to(torch.int8)
    tokens = len(codes)
    if tokens < MIN_ROWS:
        codes = F.pad(codes, (0, 0, 0, MIN_ROWS - tokens))
    weight = unpack(weight_packed, in_features)
    sums = torch._int_mm(codes, weight.t())[:tokens]
    if static:
        sums = sums - (zero_point.to(torch.int32) - 128) * weight.sum(1, dtype=torch.int32)
    y = sums.float() * weight_scale * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def dequantized_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """The fake-quantized x times the dequantized weight, in the dtype of x: as ``packed_linear_reference`` in fp32.

    In float16 and bfloat16 each factor is rounded as those of a float model are.
    """
    weight = dequantize_weight(weight_packed, weight_scale, x.shape[-1]).to(x.dtype)
    x = fake_quantize_activation(x, scheme, input_scale, input_zero_point)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
