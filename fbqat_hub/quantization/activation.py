"""Quantization of a layer's input to 8 or 16 bits: dynamic (per token, per tensor) or static."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbqat_hub.quantization.fake_quantize import pass_inside
from fbqat_hub.quantization.scheme import ActivationScheme

# A token of zeros would give a scale of 0 and codes of 0/0.
TINY_ACTIVATION = 1e-8


def quantize_activation(
    x: Tensor, scheme: ActivationScheme, input_scale: Tensor | None = None, input_zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero_point of a layer's input; real = scale * (code - zero_point).

    Args:
        x: [..., features], float; the last dimension is a token.
        scheme: 8 or 16 bits.
        input_scale: fp32 scalar, for range "static" only.
        input_zero_point: int32 scalar, for range "static" only.

    Returns:
        codes: fp32 [..., features] of whole numbers: -127..127 when dynamic (8 bits), 0..255 when static.
        scale: fp32, [..., 1] per token, else a scalar.
        zero_point: fp32 scalar; 0 when dynamic.
    """
    x = x.float()
    if scheme.range == "static":
        if input_scale is None or input_zero_point is None:
            raise ValueError("activation range is 'static', but the layer has no input_scale; calibrate it first.")
        zero_point = input_zero_point.to(x.dtype)
        codes = torch.round(x / input_scale).add_(zero_point).clamp_(0, 2**scheme.bits - 1)
        return codes, input_scale, zero_point
    largest = largest_magnitude(x, scheme)
    scale = largest.clamp_min(TINY_ACTIVATION) / (2 ** (scheme.bits - 1) - 1)
    return torch.round(x / scale), scale, x.new_zeros(())


def largest_magnitude(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """max|x| of a dynamic range: [..., 1] of each token, or a scalar of all of x; 0 where x is empty."""
    if scheme.range == "per_token":
        return x.abs().amax(-1, keepdim=True)
    return x.abs().amax() if x.numel() else x.new_zeros(())


def scale_or_nan(tokens: Tensor, input_scale: Tensor) -> Tensor:
    """fp32 [..., 1]: a static range's scale for each token, NaN where the token has one, for which there is no code."""
    return torch.where(tokens.isnan().any(-1, keepdim=True), torch.nan, input_scale)


def fake_quantize_activation(
    x: Tensor, scheme: ActivationScheme, input_scale: Tensor | None = None, input_zero_point: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize ``x`` (arguments as ``quantize_activation``); the dtype and shape of ``x``.

    The gradient is 1 (STE), and 0 where a static range clips. At 32 bits ``x`` is returned as it is.
    """
    if scheme.bits == 32:
        return x
    return _FakeQuantizeActivation.apply(x, scheme, input_scale, input_zero_point)


class _FakeQuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scheme: ActivationScheme, input_scale: Tensor | None, input_zero_point: Tensor | None
    ) -> Tensor:
        codes, scale, zero_point = quantize_activation(x, scheme, input_scale, input_zero_point)
        ctx.scheme = scheme
        if scheme.range == "static":
            ctx.save_for_backward(x, scale, zero_point)
            codes = codes.sub_(zero_point)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.scheme.range == "static":
            x, scale, zero_point = ctx.saved_tensors
            grad = pass_static(grad, x, scale, zero_point, ctx.scheme.bits)
        return grad, None, None, None


def pass_static(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The gradient of a static range: ``grad`` where x lies within it, 0 where it is clipped; the dtype of ``grad``."""
    position = x.float() / scale + zero_point
    return pass_inside(grad.float(), position, 0, 2**bits - 1).to(grad.dtype)
