"""The method: fractional-bit quantization-aware training and the packed format. torch only."""

from fbqat_hub.quantization.compensation import compensate
from fbqat_hub.quantization.convert import (
    calibrate,
    convert,
    converted,
    named_layers,
    prepare,
    quantization_disabled,
    set_bit_width,
    stored_bits_per_weight,
)
from fbqat_hub.quantization.fake_quantize import Rounding, fake_quantize, fake_quantize_affine
from fbqat_hub.quantization.linear import (
    FakeQuantizedLinear,
    FakeQuantizedPointwiseConv2d,
    PackedLinear,
    PackedPointwiseConv2d,
)
from fbqat_hub.quantization.packing import pack_int4, unpack_int4
from fbqat_hub.quantization.schedule import BitSchedule
from fbqat_hub.quantization.scheme import ActivationScheme, WeightScheme

__all__ = [
    "ActivationScheme",
    "BitSchedule",
    "FakeQuantizedLinear",
    "FakeQuantizedPointwiseConv2d",
    "PackedLinear",
    "PackedPointwiseConv2d",
    "Rounding",
    "WeightScheme",
    "calibrate",
    "compensate",
    "convert",
    "converted",
    "fake_quantize",
    "fake_quantize_affine",
    "named_layers",
    "pack_int4",
    "prepare",
    "quantization_disabled",
    "set_bit_width",
    "stored_bits_per_weight",
    "unpack_int4",
]
