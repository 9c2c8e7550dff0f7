"""The packed matmul: one function, its implementation chosen by device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fbqat_hub.quantization.kernels.reference import dequantize_weight, packed_linear_reference


def packed_linear(layer: Any, x: Tensor) -> Tensor:
    """The forward of a ``PackedLinear``: [..., in] -> [..., out], the dtype of x.

    Differentiable in x (STE through the activation quantization), so that adapters train on the packed base.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedLinear.apply(x, layer)
    return _forward(layer, x)


def _forward(layer: Any, x: Tensor) -> Tensor:
    return packed_linear_reference(
        x,
        layer.weight_packed,
        layer.weight_scale,
        layer.bias,
        layer.activation_scheme,
        layer.input_scale,
        layer.input_zero_point,
    )


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: Any) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return _forward(layer, x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        layer = ctx.layer
        weight = dequantize_weight(layer.weight_packed, layer.weight_scale, layer.in_features)
        return (grad.float() @ weight).to(grad.dtype), None


__all__ = ["packed_linear", "packed_linear_reference"]
