"""The packed matmul as one operator of torch, ``fbqat::packed_linear``, its implementation chosen by device.

It takes tensors and plain values, no module, so that ``torch.compile`` and ``torch.export`` see one node per layer:

    fbqat::packed_linear(x, weight_packed, weight_scale, bias, input_scale, input_zero_point, bits, range) -> y

| device | implementation |
|---|---|
| CPU | ``cpu.py``: int8 products, in C or by oneDNN, or ``reference.py``, in fp32 |
| CUDA, ROCm | ``gpu.py``: Triton kernels, ``torch._int_mm``, or dequantized in the dtype of x. Not measured |
| any other | ``gpu.py``'s dequantized product. Not measured |

It is differentiable in x (STE through the activation quantization) and in the bias, so that adapters train on a packed
base. Autocast changes nothing: sums of codes would overflow float16, and codes of 16 bits are exact in neither half.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.quantization.activation import pass_static
from fbqat_hub.quantization.half import has_autocast
from fbqat_hub.quantization.kernels import cpu, gpu
from fbqat_hub.quantization.kernels.reference import dequantize_weight, packed_linear_reference
from fbqat_hub.quantization.scheme import ActivationScheme

_LIBRARY = torch.library.Library("fbqat", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, Tensor? input_scale, "
    "Tensor? input_zero_point, int bits, str range) -> Tensor"
)
_LIBRARY.define(
    "packed_linear_grad(Tensor grad, Tensor? x, Tensor weight_packed, Tensor weight_scale, Tensor? input_scale, "
    "Tensor? input_zero_point, int bits, SymInt in_features) -> Tensor"
)


def packed_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """The operator: [..., in] -> [..., out], the dtype of x. Arguments as ``packed_linear_reference``."""
    y: Tensor = torch.ops.fbqat.packed_linear(
        x, weight_packed, weight_scale, bias, input_scale, input_zero_point, scheme.bits, scheme.range
    )
    return y


def _implementation(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with the reference's arguments, as one with the operator's."""

    def forward(
        x: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        bits: int,
        range: Any,
    ) -> Tensor:
        operands = (x, weight_packed, weight_scale, bias, _scheme(bits, range), input_scale, input_zero_point)
        if not has_autocast(x):
            return compute(*operands)
        with torch.autocast(x.device.type, enabled=False):
            return compute(*operands)

    return forward


@cache
def _scheme(bits: int, range: Any) -> ActivationScheme:
    return ActivationScheme(bits=bits, range=range)


def _grad(
    grad: Tensor,
    x: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    in_features: int,
) -> Tensor:
    """The gradient of x: through the dequantized weight, and 0 where a static range clips x; the dtype of ``grad``."""
    # a CPU without bf16 instructions is slow in half precision, other devices are slow in fp32
    dtype = torch.float32 if grad.device.type == "cpu" else grad.dtype
    with torch.autocast(grad.device.type, enabled=False) if has_autocast(grad) else nullcontext():
        grad_x = grad.to(dtype) @ dequantize_weight(weight_packed, weight_scale, in_features).to(dtype)
        if x is not None:
            assert input_scale is not None
            assert input_zero_point is not None
            grad_x = pass_static(grad_x, x, input_scale, input_zero_point, bits)
        return grad_x.to(grad.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_packed, weight_scale, bias, input_scale, input_zero_point, ctx.bits, _ = inputs
    clipped = None if input_scale is None else x
    ctx.save_for_backward(clipped, weight_packed, weight_scale, input_scale, input_zero_point)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_bias = None, None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.fbqat.packed_linear_grad(grad, *ctx.saved_tensors, ctx.bits, ctx.in_features)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None, None


_LIBRARY.impl("packed_linear", _implementation(cpu.packed_linear_cpu), "CPU")
_LIBRARY.impl("packed_linear", _implementation(gpu.packed_linear_gpu), "CUDA")
_LIBRARY.impl("packed_linear", _implementation(gpu.dequantized_linear), "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear_grad", _grad, "CompositeExplicitAutograd")
torch.library.register_autograd("fbqat::packed_linear", _backward, setup_context=_remember, lib=_LIBRARY)


@torch.library.register_fake("fbqat::packed_linear", lib=_LIBRARY)
def _fake(x: Tensor, weight_packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))


@torch.library.register_fake("fbqat::packed_linear_grad", lib=_LIBRARY)
def _fake_grad(grad: Tensor, *others: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], others[-1]))


__all__ = ["packed_linear", "packed_linear_reference"]
