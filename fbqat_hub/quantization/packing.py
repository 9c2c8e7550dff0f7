"""4-bit codes <-> bytes, and nothing else.

    codes    int8 [out, in]                 -8 .. 7
    packed   uint8 [out, ceil(in / 2)]      byte j of a row holds code 2j and code 2j + 1:

             bit   7 6 5 4   3 2 1 0
                  +--------+--------+
                  | 2j + 1 |   2j   |       each nibble in two's complement
                  +--------+--------+

The low nibble comes first, as in ONNX's INT4. If ``in`` is odd, the last high nibble is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are {codes.dtype}; pack_int4 takes int8.")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"codes run from {int(codes.min())} to {int(codes.max())}; 4 bits hold -8 to 7.")
    nibbles = codes.view(torch.uint8) & 0xF
    if codes.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


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
