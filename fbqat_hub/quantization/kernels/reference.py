"""The packed matmul in plain torch: what every other kernel must equal."""

from __future__ import annotations

from torch import Tensor

from fbqat_hub.quantization.activation import quantize_activation
from fbqat_hub.quantization.packing import unpack
from fbqat_hub.quantization.scheme import ActivationScheme


def dequantize_weight(weight_packed: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    """The real weight, scale * code.

    Args:
        weight_packed: uint8 [out, ceil(in / 2)], or int8 [out, in] (``packing.py``).
        weight_scale: fp32 [out], or [out, groups] for per-group scales.
        in_features: ``in``.

    Returns:
        fp32 [out, in].
    """
    codes = unpack(weight_packed, in_features).float()
    if weight_scale.dim() == 1:
        return codes * weight_scale[:, None]
    out_features, groups = weight_scale.shape
    return (codes.view(out_features, groups, -1) * weight_scale[..., None]).view(out_features, in_features)


def packed_linear_reference(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """y = (scale_x * scale_w) * (codes_x - zero_point) @ codes_w^T + bias, accumulated in fp32.

    Sums of products of an 8-bit and a 4-bit code are exact in fp32 up to 2^24 / (255 * 8) = 8,224 inputs, those with
    an 8-bit code up to 2^24 / (255 * 128) = 514; beyond that fp32 rounds.

    Args:
        x: [..., in], any float dtype.
        weight_packed, weight_scale: as ``dequantize_weight``.
        bias: [out] or None.
        scheme, input_scale, input_zero_point: as ``quantize_activation``; at 32 bits x is not quantized.

    Returns:
        [..., out], the dtype of x.
    """
    in_features = x.shape[-1]
    if scheme.bits == 32:
        y = x.float() @ dequantize_weight(weight_packed, weight_scale, in_features).t()
    else:
        codes, scale, zero_point = quantize_activation(x, scheme, input_scale, input_zero_point)
        codes = codes - zero_point
        if weight_scale.dim() == 1:
            y = codes @ unpack(weight_packed, in_features).float().t() * weight_scale * scale
        else:
            y = codes @ dequantize_weight(weight_packed, weight_scale, in_features).t() * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
