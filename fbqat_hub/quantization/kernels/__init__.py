"""The packed matmul: one function, its implementation chosen by device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbqat_hub.quantization.activation import pass_static
from fbqat_hub.quantization.half import has_autocast
from fbqat_hub.quantization.kernels import cpu
from fbqat_hub.quantization.kernels.reference import dequantize_weight, packed_linear_reference


def packed_linear(layer: Any, x: Tensor) -> Tensor:
    """The forward of a ``PackedLinear``: [..., in] -> [..., out], the dtype of x.

    Differentiable in x (STE through the activation quantization), so that adapters train on the packed base. Autocast
    changes nothing: sums of codes would overflow float16, and codes of 16 bits are not exact in either half.
    """
    if has_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return packed_linear(layer, x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedLinear.apply(x, layer)
    return _forward(layer, x)


def _forward(layer: Any, x: Tensor) -> Tensor:
    activation = (layer.activation_scheme, layer.input_scale, layer.input_zero_point)
    supported = cpu.is_supported(layer.weight_scale, layer.activation_scheme, layer.weight_bits)
    if x.device.type == "cpu" and x.numel() and supported:
        return cpu.packed_linear_cpu(x, _prepared(layer), layer.bias, *activation)
    return packed_linear_reference(x, layer.weight_packed, layer.weight_scale, layer.bias, *activation)


def _prepared(layer: Any) -> cpu.PreparedWeight:
    """The layer's weight in the kernel's layout, made at the first forward and again whenever the weight changed."""
    packed, scale = layer.weight_packed, layer.weight_scale
    state = (packed.data_ptr(), packed._version, scale.data_ptr(), scale._version)
    if layer._prepared is None or layer._prepared[0] != state:
        layer._prepared = (state, cpu.prepare_weight(packed, scale, layer.in_features))
    return layer._prepared[1]


class _PackedLinear(torch.autograd.Function):
    """The gradient of x alone: through the dequantized weight, and 0 where a static range clips x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        if layer.input_scale is not None:
            ctx.save_for_backward(x)
        return _forward(layer, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        weight = dequantize_weight(layer.weight_packed, layer.weight_scale, layer.in_features)
        grad_x = grad.float() @ weight
        if ctx.saved_tensors:
            (x,) = ctx.saved_tensors
            grad_x = pass_static(grad_x, x, layer.input_scale, layer.input_zero_point, layer.activation_scheme.bits)
        return grad_x.to(grad.dtype), None


__all__ = ["packed_linear", "packed_linear_reference"]
