"""Codes <-> bytes, and nothing else. The dtype of what is stored says how.

Codes of up to 4 bits, two to a byte:

    codes    int8 [out, in]                 -8 .. 7
    packed   uint8 [out, ceil(in / 2)]      byte j of a row holds code 2j and code 2j + 1:

             bit   7 6 5 4   3 2 1 0
                  +--------+--------+
                  | 2j + 1 |   2j   |       each nibble in two's complement
                  +--------+--------+

The low nibble comes first, as in ONNX's INT4. If ``in`` is odd, the last high nibble is 0.

Codes of 5 to 8 bits, one to a byte, as they are:

    codes    int8 [out, in]                 -2^(bits-1) .. 2^(bits-1) - 1
    packed   int8 [out, in]
"""

from __future__ import annotations

import torch
from torch import Tensor

# The widest codes that are stored two to a byte.
NIBBLE = 4


def packed_dtype(bits: int) -> torch.dtype:
    """What codes of ``bits`` bits are stored as: uint8 for two to a byte, int8 for one."""
    return torch.uint8 if bits <= NIBBLE else torch.int8


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of a row of ``in_features`` codes.

    >>> packed_width(7, 4), packed_width(7, 6)
    (4, 7)
    """
    return (in_features + 1) // 2 if bits <= NIBBLE else in_features


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes as ``bits`` asks for: ``pack_int4`` up to 4 bits, else as they are.

    Args:
        codes: int8 [..., in], of the grid of ``bits`` bits where that is above 4.
        bits: whole, from 2 to 8.

    Returns:
        ``packed_dtype(bits)`` [..., packed_width(in, bits)].

    Raises:
        ValueError: a code that the width cannot hold, or another dtype.

    >>> pack(torch.tensor([[31, -32, 7]], dtype=torch.int8), 6).tolist()
    [[31, -32, 7]]
    """
    if bits <= NIBBLE:
        return pack_int4(codes)
    check_codes(codes, bits)
    return codes.contiguous()


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of ``pack``, by the dtype of ``packed``: int8 [..., in_features].

    Raises:
        ValueError: a dtype or a shape that ``pack`` does not give.
    """
    if packed.dtype != torch.int8:
        return unpack_int4(packed, in_features)
    if packed.shape[-1] != in_features:
        raise ValueError(f"packed weight is int8 {tuple(packed.shape)}; for {in_features} inputs [..., {in_features}].")
    return packed


def check_codes(codes: Tensor, bits: int) -> None:
    """Raise ValueError for codes that are not int8, or not of the grid of ``bits`` bits."""
    half = 2 ** (bits - 1)
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are {codes.dtype}; they must be int8.")
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise ValueError(
            f"codes run from {int(codes.min())} to {int(codes.max())}; {bits} bits hold {-half} to {half - 1}."
        )


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes two to a byte.

    Args:
        codes: int8 [..., in], each -8..7.

    Returns:
        uint8 [..., ceil(in / 2)].

    Raises:
        ValueError: a code that 4 bits cannot hold, or another dtype.

    >>> pack_int4(torch.tensor([[1, -1, 7]], dtype=torch.int8)).tolist()     # 0xF1, 0x07
    [[241, 7]]
    """
    check_codes(codes, NIBBLE)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    bytes_ = codes.view(torch.uint8)
    packed = bytes_[..., 1::2] << 4
    return packed.bitwise_or_(bytes_[..., 0::2] & 0xF)


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of ``pack_int4``.

    Args:
        packed: uint8 [..., ceil(in / 2)].
        in_features: ``in``, which the bytes alone do not tell when it is odd.

    Returns:
        int8 [..., in_features].

    >>> unpack_int4(torch.tensor([[241, 7]], dtype=torch.uint8), 3).tolist()
    [[1, -1, 7]]
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != (in_features + 1) // 2:
        raise ValueError(
            f"packed weight is {packed.dtype} {tuple(packed.shape)}; for {in_features} inputs it must be "
            f"uint8 [..., {(in_features + 1) // 2}]."
        )
    # An arithmetic shift right by 4 sign-extends a nibble that sits in the high half of an int8.
    high = packed.view(torch.int8) >> 4
    low = (packed << 4).view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)[..., :in_features]
