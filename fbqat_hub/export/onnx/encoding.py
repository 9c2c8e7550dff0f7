"""Encodings of activations in ONNX."""

from __future__ import annotations

from dataclasses import dataclass

from fbqat_hub.export.errors import ExportError
from fbqat_hub.quantization.observer import affine_parameters
from fbqat_hub.quantization.packed import PackedLayer


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
    return Encoding(*affine_parameters(low, high, bits), bits)


def trained_encoding(layer: PackedLayer | None) -> Encoding | None:
    """The static encoding `layer` was trained with, exactly; None where its range is dynamic or it is no layer."""
    if layer is None or layer.input_scale is None:
        return None
    if layer.input_zero_point is None:
        raise ExportError("a packed layer has an input_scale but no input_zero_point")
    return Encoding(float(layer.input_scale), int(layer.input_zero_point), layer.activation_bits)
