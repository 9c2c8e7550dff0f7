"""What is quantized how: one scheme for weights, one for activations. Plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fbqat_hub.quantization.fake_quantize import check_bit_width

Granularity = Literal["per_tensor", "per_channel", "per_group"]
Mapping = Literal["symmetric", "affine"]
Clip = Literal["max_abs", "mse", "learned"]
ActivationRange = Literal["per_token", "per_tensor", "static"]


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


@dataclass(frozen=True, kw_only=True)
class WeightScheme:
    """How weights are quantized.

    Attributes:
        bits: the bit width that is trained towards and stored.
        mapping: "symmetric" (eq. 1) or "affine" (eq. 2; for training experiments, format 1 does not store it).
        granularity: what shares a scale: the whole tensor, an output channel, or ``group_size`` inputs of one.
        group_size: inputs that share a scale; only for "per_group". Less in a layer whose inputs it does not divide
            (``linear.group_count``).
        narrow: codes -7..7 instead of -8..7; symmetric only.
        clip: "max_abs" (from the weight at each forward, as the paper), "mse" (least squared error, set when the
            bit width is set), or "learned" (starts at "mse", then trained: LSQ).
    """

    bits: float = 4.0
    mapping: Mapping = "symmetric"
    granularity: Granularity = "per_channel"
    group_size: int | None = None
    narrow: bool = False
    clip: Clip = "max_abs"

    def __post_init__(self) -> None:
        check_bit_width(self.bits)
        _one_of("weight mapping", self.mapping, get_args(Mapping))
        _one_of("weight granularity", self.granularity, get_args(Granularity))
        _one_of("weight clip", self.clip, get_args(Clip))
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity 'per_group', and with no other.")
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise ValueError(f"group_size is {self.group_size}; it must be an even number of at least 2.")
        if self.mapping == "affine" and self.clip != "max_abs":
            raise ValueError(f"affine weights take their range from min and max; clip {self.clip!r} is symmetric only.")
        if self.mapping == "affine" and self.narrow:
            raise ValueError("affine codes run from 0; narrow is symmetric only.")


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    """How the inputs of a quantized layer are quantized.

    Attributes:
        bits: 8 or 16; 32 leaves activations in float.
        range: "per_token" (symmetric, from each token), "per_tensor" (symmetric, from each batch), or "static"
            (affine, from calibration; what a phone needs).
    """

    bits: int = 8
    range: ActivationRange = "per_token"

    def __post_init__(self) -> None:
        _one_of("activation bits", self.bits, (8, 16, 32))
        _one_of("activation range", self.range, get_args(ActivationRange))
