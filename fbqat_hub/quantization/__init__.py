"""The method: fractional-bit quantization-aware training and the packed format. torch only."""

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
from fbqat_hub.quantization.fake_quantize import fake_quantize
from fbqat_hub.quantization.gptq import gptq_initialize
from fbqat_hub.quantization.linear import FakeQuantizedLinear, FakeQuantizedPointwiseConv2d
from fbqat_hub.quantization.packed import PackedLayer, PackedLinear, PackedPointwiseConv2d
from fbqat_hub.quantization.packing import pack_int4, unpack_int4
from fbqat_hub.quantization.quantize import quantize_weight
from fbqat_hub.quantization.rounding import Rounding
from fbqat_hub.quantization.schedule import BitSchedule
from fbqat_hub.quantization.scheme import ActivationScheme, WeightScheme

__all__ = [
    "ActivationScheme",
    "BitSchedule",
    "FakeQuantizedLinear",
    "FakeQuantizedPointwiseConv2d",
    "PackedLayer",
    "PackedLinear",
    "PackedPointwiseConv2d",
    "Rounding",
    "WeightScheme",
    "calibrate",
    "convert",
    "converted",
    "fake_quantize",
    "gptq_initialize",
    "named_layers",
    "pack_int4",
    "prepare",
    "quantization_disabled",
    "quantize_weight",
    "set_bit_width",
    "stored_bits_per_weight",
    "unpack_int4",
]
