"""The product of a fake-quantized layer in bfloat16 or float16: codes are multiplied, then scaled.

bfloat16 holds whole numbers exactly up to 256, float16 up to 2048. Codes of 8-bit inputs (less their zero_point) and of
weights of up to 9 bits therefore lose nothing there, while scale * code would lose up to 2^-9 of each factor. Products
are summed in float32, so that a layer equals its float32 computation but for the rounding of its output.

    y[o] = scale * weight_scale[o] * sum over i of code[i] * weight_code[o, i]  +  bias[o]

What is no code is rounded to half precision as in any layer: inputs at 32 bits. So are codes of more than 9 bits.
Layers of 16-bit inputs compute in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fbqat_hub.quantization.activation import fake_quantize_activation, pass_static, quantize_activation
from fbqat_hub.quantization.scheme import ActivationScheme

HALF = (torch.float16, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``x`` is computed: that of autocast where it is on, else its own."""
    if x.dtype != torch.float64 and has_autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def has_autocast(x: Tensor) -> bool:
    """True within ``torch.autocast`` of the device of ``x``."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def half_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """A linear layer of a quantized input and a fake-quantized weight: [..., in] -> [..., out].

    Args:
        x: any float dtype.
        weight: fp32 [out, in], codes times scales.
        weight_scale: fp32 [out, 1], or [1, 1] for the whole tensor, or [out, groups, 1] of ``in / groups`` inputs.
        bias: [out] or None.
        dtype: float16 or bfloat16, of the products and of the output.
        scheme, input_scale, input_zero_point: as ``quantize_activation``.

    Returns:
        ``dtype`` [..., out]. Differentiable in x (STE, 0 where a static range clips), weight and bias.
    """
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.float()
        if scheme.bits == 16:
            x = fake_quantize_activation(x.float(), scheme, input_scale, input_zero_point)
            return F.linear(x, weight, bias).to(dtype)
        y = _ProductOfCodes.apply(x, weight, weight_scale, dtype, scheme, input_scale, input_zero_point)
        return (y if bias is None else y + bias).to(dtype)


class _ProductOfCodes(torch.autograd.Function):
    """x_q W^T in fp32, from the codes of both; its gradient is that of real values in half precision."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        dtype: torch.dtype,
        scheme: ActivationScheme,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
    ) -> Tensor:
        static, scale, zero_point = scheme.range == "static" and scheme.bits < 32, None, None
        if scheme.bits == 32:
            codes = real = x.to(dtype)
        else:
            whole, scale, zero_point = quantize_activation(x, scheme, input_scale, input_zero_point)
            whole = whole.sub_(zero_point)
            codes, real = whole.to(dtype), whole.mul_(scale).to(dtype)
        ctx.x_dtype, ctx.bits = x.dtype, scheme.bits
        ctx.save_for_backward(real, weight.to(dtype), *((x, scale, zero_point) if static else ()))

        row_scale = weight_scale.amax(1) if weight_scale.dim() == 3 else weight_scale
        steps = weight / row_scale
        weight_codes = steps.to(dtype)
        if weight_scale.dim() == 3:  # codes of a group in steps of another's: two parts hold what one would lose
            weight_codes = torch.cat((weight_codes, (steps - weight_codes).to(dtype)), -1)
            codes = torch.cat((codes, codes), -1)
        y = _product(codes.reshape(-1, codes.shape[-1]), weight_codes.t()).mul_(row_scale.t())
        y = y.view(*x.shape[:-1], len(weight))
        return y if scale is None else y.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        real, weight, *of_range = ctx.saved_tensors
        grad = grad.to(real.dtype)
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).to(ctx.x_dtype)
            if of_range:
                x, scale, zero_point = of_range
                grad_x = pass_static(grad_x, x, scale, zero_point, ctx.bits)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(grad.reshape(-1, grad.shape[-1]).t(), real.reshape(-1, real.shape[-1]))
        return grad_x, grad_weight, None, None, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of half-precision matrices with sums and result in float32."""
    if a.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
