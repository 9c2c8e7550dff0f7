"""What is quantized how: one scheme for weights, one for activations. Plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fbqat_hub.quantization.fake_quantize import check_bit_width

Granularity = Literal["per_tensor", "per_channel", "per_group"]
ClipName = Literal["max_abs", "mse", "learned"]
ActivationRange = Literal["per_token", "per_tensor", "static"]


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


@dataclass(frozen=True, kw_only=True)
class WeightScheme:
    """How weights are quantized: symmetric codes, as eq. 1 of the paper.

    Attributes:
        bits: the bit width that is trained towards and stored.
        granularity: what shares a scale: the whole tensor, an output channel, or ``group_size`` inputs of one.
        group_size: inputs that share a scale; only for "per_group". Less in a layer whose inputs it does not divide
            (``quantize.group_count``).
        clip: "max_abs" (from the weight at each forward, as the paper), "mse" (least squared error, set when the
            bit width is set), or "learned" (starts at "mse", then trained: LSQ): a key of ``clip.CLIPS``.
    """

    bits: float = 4.0
    granularity: Granularity = "per_channel"
    group_size: int | None = None
    clip: ClipName = "max_abs"

    def __post_init__(self) -> None:
        check_bit_width(self.bits)
        _one_of("weight granularity", self.granularity, get_args(Granularity))
        _one_of("weight clip", self.clip, get_args(ClipName))
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity 'per_group', and with no other.")
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise ValueError(f"group_size is {self.group_size}; it must be an even number of at least 2.")


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
