"""Encodings of activations, and the bytes of 4-bit weights in ONNX."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fbqat_hub.export.errors import ExportError
from fbqat_hub.quantization.linear import PackedLinear


@dataclass(frozen=True)
class Encoding:
    """real = scale * (q - zero_point), q an unsigned integer of `bits` bits; scale is a float32 value."""

    scale: float
    zero_point: int
    bits: int

    def widened(self) -> Encoding:
        """The 16-bit encoding that holds every value of this 8-bit one exactly.

        >>> Encoding(0.5, 3, 8).widened()
        Encoding(scale=0.001953125, zero_point=768, bits=16)
        """
        return Encoding(self.scale / 256, self.zero_point * 256, 16)


def encoding_for_range(low: float, high: float, bits: int) -> Encoding:
    """The affine encoding of [low, high], widened to hold 0.

    >>> encoding_for_range(0.0, 255.0, 8)
    Encoding(scale=1.0, zero_point=0, bits=8)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, 1e-6) / (2**bits - 1))
    return Encoding(float(scale), int(np.clip(round(-low / float(scale)), 0, 2**bits - 1)), bits)


def trained_encoding(layer: PackedLinear | None) -> Encoding | None:
    """The static encoding `layer` was trained with, exactly; None where its range is dynamic or it is no layer."""
    if layer is None or layer.input_scale is None:
        return None
    if layer.input_zero_point is None:
        raise ExportError("a packed layer has an input_scale but no input_zero_point")
    return Encoding(float(layer.input_scale), int(layer.input_zero_point), layer.activation_bits)


def pack_int4(codes: np.ndarray) -> bytes:
    """Codes -8..7 to ONNX INT4 bytes: two a byte over the flattened array, low nibble first, odd end padded with 0.

    >>> pack_int4(np.array([1, -1, 7], np.int8)).hex()
    'f107'
    """
    nibbles = codes.reshape(-1).astype(np.uint8) & 0xF
    nibbles = np.append(nibbles, np.uint8(0)) if nibbles.size % 2 else nibbles
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()
