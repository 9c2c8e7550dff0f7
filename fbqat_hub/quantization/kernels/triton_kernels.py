"""Two Triton kernels a layer: quantize the tokens, then int8 products that read 4-bit weights as they are stored.

    1. codes, scale = quantize(x)                                    one program per token
    2. y = scale * weight_scale * (codes - zero_point) @ W^T + bias  one program a tile of y

A byte of the weight holds the codes of inputs 2j (low nibble) and 2j + 1 (high nibble). The first kernel therefore
writes the codes of x with even columns before odd ones, and the second multiplies each half with its nibbles:

    codes of x    int8 [tokens, 2, half]      half = ceil(in / 2), rounded up to 16, zeros behind
    y             even @ low^T + odd @ high^T

A nibble stays where one operation puts it, in the upper half of an int8 (``byte << 4``, ``byte & 0xF0``): 16 times
its code in two's complement. The sums are divided by 16 afterwards, exactly. Weights of one code a byte are multiplied
as they are, with codes of x in their own order.

int32 holds the sums of 131,071 = (2^31 - 1) / (128 * 128) inputs. All rounding is IEEE: half to even, true division.

Importing this imports triton. With ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fbqat_hub.quantization.activation import TINY_ACTIVATION, largest_magnitude
from fbqat_hub.quantization.scheme import ActivationScheme

# One program quantizes a whole token.
MAX_INPUTS = 65536
_ALIGNMENT = 16

# 1.5 * 2^23: adding it to a float below 2^22 rounds that to a whole number, half to even.
_ROUNDER = tl.constexpr(12582912.0)
_TINY = tl.constexpr(TINY_ACTIVATION)


@triton.jit
def _quantize(
    x,
    codes,
    scales,
    input_scale,
    input_zero_point,
    inputs,
    x_stride,
    half,
    RANGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + token * x_stride + column, mask=column < inputs, other=0.0).to(tl.float32)
    if RANGE == "static":
        zero_point = tl.load(input_zero_point).to(tl.float32)
        steps = tl.div_rn(value, tl.load(input_scale))
        steps = tl.minimum(tl.maximum(steps, -zero_point), 255.0 - zero_point)
        code = (steps + _ROUNDER) - _ROUNDER + (zero_point - 128.0)
        code = tl.where(column < inputs, code, 0.0)
        # no code holds a NaN
        nans = tl.sum(tl.where(value == value, 0, 1), axis=0)
        tl.store(scales + token, tl.where(nans == 0, tl.load(input_scale), float("nan")))
    else:
        if RANGE == "per_token":
            # a NaN among the inputs makes the scale infinite, so that it does not vanish
            largest = tl.max(tl.where(value == value, tl.abs(value), float("inf")), axis=0)
            scale = tl.div_rn(tl.maximum(largest, _TINY), 127.0)
        else:
            scale = tl.load(input_scale)
        tl.store(scales + token, scale)
        code = (tl.div_rn(value, scale) + _ROUNDER) - _ROUNDER
    code = code.to(tl.int8)
    row = codes + token * (2 * half)
    if SPLIT:
        even, odd = tl.split(tl.reshape(code, (BLOCK // 2, 2)))
        column = tl.arange(0, BLOCK // 2)
        tl.store(row + column, even, mask=column < half)
        tl.store(row + half + column, odd, mask=column < half)
    else:
        tl.store(row + column, code, mask=column < 2 * half)


# tokens, outputs and bytes of a weight's row in a tile; stages; warps
_TILES = (
    (16, 32, 128, 5, 4),
    (16, 64, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (128, 128, 64, 3, 8),
    (128, 256, 64, 3, 8),
    (256, 128, 64, 3, 8),
)
CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_stages=stages, num_warps=warps)
    for m, n, k, stages, warps in _TILES
]

INTERPRETED = triton.knobs.runtime.interpret


def suited(configs: Sequence[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Of the tiles those whose tokens are neither fewer than half nor more than twice ``token_bucket``; never none."""
    bucket = min(max(arguments["token_bucket"], 16), 128)
    return [config for config in configs if bucket // 2 <= config.kwargs["BLOCK_M"] <= max(bucket * 2, 32)]


@triton.autotune(
    # the interpreter has no clock to choose by
    configs=[triton.Config({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 256})] if INTERPRETED else CONFIGS,
    key=["token_bucket", "outputs", "width"],
    prune_configs_by={"early_config_prune": suited},
    cache_results=True,
)
@triton.heuristics({"EVEN": lambda given: given["width"] % (given["BLOCK_K"] * (1 if given["SPLIT"] else 2)) == 0})
@triton.jit(do_not_specialize=["tokens", "token_bucket"])
def _multiply(
    codes,
    scales,
    weight,
    weight_scale,
    bias,
    zero_point,
    y,
    tokens,
    token_bucket,
    outputs,
    width,
    half,
    SPLIT: tl.constexpr,
    RANGE: tl.constexpr,
    BIAS: tl.constexpr,
    PTX: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # tiles that run at the same time share rows of both factors: eight rows of tiles, column after column
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    band = tl.program_id(0) // (8 * tiles_n)
    height = tl.minimum(tiles_m - 8 * band, 8)
    inside = tl.program_id(0) % (8 * tiles_n)
    token = (8 * band + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, BLOCK_K)

    # rows beyond the end are read again from the start, and not stored
    code_at = codes + (token % tokens).to(tl.int64)[:, None] * (2 * half) + place[None, :]
    weight_at = weight + (output % outputs).to(tl.int64)[None, :] * width + place[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    weight_sum = tl.zeros((BLOCK_N,), dtype=tl.int32)
    # two products a turn: the halves of a byte, or two bytes (a loop of one product is compiled worse on sm_8x)
    STEP: tl.constexpr = BLOCK_K if SPLIT else 2 * BLOCK_K
    apart = half if SPLIT else BLOCK_K
    for start in range(0, width, STEP):
        left = width - start
        if EVEN:
            first = tl.load(code_at)
            second = tl.load(code_at + apart)
            packed = tl.load(weight_at)
        else:
            first = tl.load(code_at, mask=place[None, :] < left, other=0)
            second = tl.load(code_at + apart, mask=place[None, :] < (left if SPLIT else left - BLOCK_K), other=0)
            packed = tl.load(weight_at, mask=place[:, None] < left, other=0)
        if not SPLIT:
            low = packed
            if EVEN:
                high = tl.load(weight_at + BLOCK_K)
            else:
                high = tl.load(weight_at + BLOCK_K, mask=place[:, None] < left - BLOCK_K, other=0)
        elif PTX:  # four bytes in an instruction, where the compiler would take them one by one
            shift: tl.constexpr = "{ .reg .b32 r; shl.b32 r, $1, 4; and.b32 $0, r, 0xF0F0F0F0; }"
            low = tl.inline_asm_elementwise(shift, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
            mask: tl.constexpr = "and.b32 $0, $1, 0xF0F0F0F0;"
            high = tl.inline_asm_elementwise(mask, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
        else:
            low = (packed << 4).to(tl.int8, bitcast=True)
            high = (packed & 0xF0).to(tl.int8, bitcast=True)
        total = tl.dot(first, low, total, out_dtype=tl.int32)
        total = tl.dot(second, high, total, out_dtype=tl.int32)
        if RANGE == "static":
            weight_sum += tl.sum(low.to(tl.int32) + high.to(tl.int32), axis=0)
        code_at += STEP
        weight_at += STEP

    if RANGE == "static":  # codes of x were stored less 128
        total -= ((tl.load(zero_point) - 128) * weight_sum)[None, :]
    if SPLIT:
        total = total >> 4
    stored = output < outputs
    scaled = total.to(tl.float32) * tl.load(weight_scale + output, mask=stored, other=0.0)[None, :]
    scaled = scaled * tl.load(scales + token, mask=token < tokens, other=0.0)[:, None]
    if BIAS:
        scaled += tl.load(bias + output, mask=stored, other=0.0).to(tl.float32)[None, :]
    y_at = y + token.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(y_at, scaled.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & stored[None, :])


def triton_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """As ``packed_linear_reference``: [..., in] -> [..., out], the dtype of x.

    For 8-bit inputs, one scale per output channel, and up to ``MAX_INPUTS`` inputs; x is not empty.
    """
    inputs, outputs = x.shape[-1], len(weight_packed)
    rows = x.reshape(-1, inputs)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    with torch.cuda.device_of(x):
        split = weight_packed.dtype == torch.uint8
        codes, scales = quantize(rows, scheme, input_scale, input_zero_point, split=split)
        y = x.new_empty((len(rows), outputs))
        arguments = multiply_arguments(codes, scales, weight_packed, weight_scale, bias, input_zero_point, y)
        _multiply[tiles(len(rows), outputs)](
            *arguments, SPLIT=split, RANGE=scheme.range, BIAS=bias is not None, PTX=has_ptx(x)
        )
    return y.view(*x.shape[:-1], outputs)


def quantize(
    rows: Tensor, scheme: ActivationScheme, input_scale: Tensor | None, input_zero_point: Tensor | None, *, split: bool
) -> tuple[Tensor, Tensor]:
    """Codes and scales of [tokens, in], whose last stride is 1.

    Args:
        rows: any float dtype.
        scheme, input_scale, input_zero_point: as ``quantize_activation``, at 8 bits.
        split: even columns before odd ones, as the nibbles of a weight are multiplied.

    Returns:
        codes: int8 [tokens, 2, half], zeros behind; a static code 0..255 less 128.
        scales: fp32 [tokens], whatever the range.
    """
    tokens, inputs = rows.shape
    half = -(-inputs // (2 * _ALIGNMENT)) * _ALIGNMENT
    codes = torch.empty((tokens, 2, half), dtype=torch.int8, device=rows.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    if scheme.range == "per_tensor":
        input_scale = largest_magnitude(rows.float(), scheme).clamp_min_(TINY_ACTIVATION).div_(127)
    block = triton.next_power_of_2(2 * half)
    _quantize[(tokens,)](
        rows,
        codes,
        scales,
        scales if input_scale is None else input_scale,
        scales if input_zero_point is None else input_zero_point,
        inputs,
        rows.stride(0),
        half,
        RANGE=scheme.range,
        SPLIT=split,
        BLOCK=block,
        num_warps=warps_of(block),
    )
    return codes, scales


def warps_of(inputs: int) -> int:
    """Of a program that quantizes a token: a warp for 1024 inputs, up to 16."""
    return min(max(inputs // 1024, 1), 16)


def multiply_arguments(
    codes: Tensor,
    scales: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_zero_point: Tensor | None,
    y: Tensor,
) -> tuple[Any, ...]:
    """What the second kernel takes by place; a tensor that is not there is replaced by one that is not read."""
    tokens, outputs = y.shape
    return (
        codes,
        scales,
        weight_packed.contiguous(),
        weight_scale.contiguous(),
        scales if bias is None else bias.contiguous(),
        scales if input_zero_point is None else input_zero_point,
        y,
        tokens,
        triton.next_power_of_2(tokens),
        outputs,
        weight_packed.shape[1],
        codes.shape[2],
    )


def has_ptx(x: Tensor) -> bool:
    """True on NVIDIA's cards; AMD's and the interpreter do not read its assembly."""
    return x.is_cuda and torch.version.hip is None


def tiles(tokens: int, outputs: int) -> Callable[[dict[str, Any]], tuple[int]]:
    """Programs of the second kernel for a tile."""
    return lambda tile: (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(outputs, tile["BLOCK_N"]),)
