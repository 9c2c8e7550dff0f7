"""The packed matmul on GPUs. Of these the first that a card and a layer suit:

    1. Triton kernels of our own (``triton_kernels.py``): 8-bit inputs, one scale per output channel; NVIDIA from
       compute capability 8.0, AMD's with int8 matrix cores, where triton is installed
    2. int8 products by ``torch._int_mm``: the same layers, sizes that it takes; NVIDIA from 7.5, the same of AMD
    3. dequantized, one product in the dtype of x

The weight is read as it is stored, or, if memory is "large" (``memory.py``), an int8 copy of 4-bit codes is kept for 1.
and 2.: one byte per weight more, and nothing to unpack.

Not measured: it was written without a GPU. The first is tested in Triton's interpreter, the others are plain torch that
runs on a CPU. On a card, the first use of 1. multiplies a small matrix and compares; if that fails, a warning says so
and 2. is used.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fbqat_hub.quantization.activation import fake_quantize_activation, quantize_activation, scale_or_nan
from fbqat_hub.quantization.kernels import memory
from fbqat_hub.quantization.kernels.reference import dequantize_weight, packed_linear_reference
from fbqat_hub.quantization.packing import pack, unpack
from fbqat_hub.quantization.scheme import ActivationScheme

# what torch._int_mm asks for on CUDA: more than 16 rows, inner and outer sizes that 8 divides
MIN_ROWS = 17
MULTIPLE = 8
# int32 holds the sums of this many products of two int8 codes.
MAX_INPUTS = (2**31 - 1) // (128 * 128)
# AMD's architectures with int8 matrix instructions: CDNA, RDNA 3 and 4
_AMD_INT8 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


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
    linear = implementation(x, weight_packed, weight_scale, scheme)
    if linear is not dequantized_linear and weight_packed.dtype == torch.uint8:
        if memory.get_memory() == "large":
            weight_packed = memory.keep(weight_packed, x.shape[-1], _codes)
        else:
            memory.forget(weight_packed)
    return linear(x, weight_packed, weight_scale, bias, scheme, input_scale, input_zero_point)


def _codes(weight_packed: Tensor, in_features: int) -> Tensor:
    """int8 [out, in]: the weight as ``packing.pack`` gives it at 5 to 8 bits."""
    return unpack(weight_packed, in_features).contiguous()


def implementation(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, scheme: ActivationScheme
) -> Callable[..., Tensor]:
    """The function that multiplies such operands, with the arguments of ``packed_linear_reference``."""
    inputs = x.shape[-1]
    if not x.numel() or weight_scale.dim() != 1 or scheme.bits != 8 or inputs > MAX_INPUTS:
        return dequantized_linear
    kernels = triton_kernels(x.device)
    if kernels is not None and inputs <= kernels.MAX_INPUTS:
        found: Callable[..., Tensor] = kernels.triton_linear
        return found
    if has_int8_products(x.device) and inputs % MULTIPLE == 0 and weight_packed.shape[0] % MULTIPLE == 0:
        return int8_linear
    return dequantized_linear


@cache
def has_int8_products(device: torch.device) -> bool:
    """True where int8 matrix products are done by tensor cores (NVIDIA, from 7.5) or matrix cores (AMD)."""
    if device.type != "cuda":
        return True
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).startswith(_AMD_INT8)
    return torch.cuda.get_device_capability(device) >= (7, 5)


@cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """The module of our Triton kernels where they work on this card; warns where they should and do not."""
    if device.type != "cuda" or not has_int8_products(device):
        return None
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):  # what Triton supports
        return None
    try:
        kernels = importlib.import_module("fbqat_hub.quantization.kernels.triton_kernels")
    except ImportError:
        return None
    try:
        reason = None if multiplies_exactly(kernels.triton_linear, device) else "a small product came out wrong"
    except Exception as error:  # of the compiler, the driver or a missing C compiler
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return kernels
    warnings.warn(f"fbqat's Triton kernels are not used on {device}, which is slower: {reason}", stacklevel=2)
    return None


def multiplies_exactly(linear: Callable[..., Tensor], device: torch.device) -> bool:
    """Whether a function gives the reference's numbers to the bit, for 4-bit and 8-bit codes of a small layer."""
    x = torch.linspace(-3, 3, 5 * 96, dtype=torch.float32).view(5, 96).sin()
    scheme = ActivationScheme()
    for bits in (4, 8):
        codes = (torch.arange(40 * 96) * 7 % 2**bits - 2 ** (bits - 1)).to(torch.int8).view(40, 96)
        operands = x, pack(codes, bits), torch.linspace(0.01, 0.02, 40, dtype=torch.float32)
        found = linear(*(operand.to(device) for operand in operands), None, scheme).cpu()
        if not torch.equal(found, packed_linear_reference(*operands, None, scheme)):
            return False
    return True


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
        scale = scale_or_nan(x.reshape(-1, in_features), scale)
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
