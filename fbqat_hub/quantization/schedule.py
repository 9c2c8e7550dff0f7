"""Bit schedules: training progress -> bit width and softness. Pure functions, serialisable.

Progress f runs from 0 (first step) to 1. A schedule is data: ``BitSchedule.from_dict(s.to_dict()) == s``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fbqat_hub.quantization.fake_quantize import check_bit_width


@dataclass(frozen=True)
class BitSchedule:
    """Bit width and softness as functions of progress.

    Attributes:
        stages: (bit width, share of training) in order; shares are relative. One stage is a constant width.
        softness: softness of the staircase at the start (0 is off); it falls linearly to 0 at ``soft_until``.
        soft_until: the progress from which the grid is hard.

    >>> BitSchedule.preset("paper").bit_width(0.25), BitSchedule.preset("paper").bit_width(0.44)
    (4.75, 4.0)
    """

    stages: tuple[tuple[float, float], ...]
    softness: float = 0.0
    soft_until: float = 0.0

    def __init__(
        self,
        stages: Sequence[tuple[float, float]],
        softness: float = 0.0,
        soft_until: float = 0.0,
    ) -> None:
        pairs = tuple((check_bit_width(width), float(share)) for width, share in stages)
        if not pairs or not all(math.isfinite(share) and share > 0 for _, share in pairs):
            raise ValueError(f"stages are {list(stages)}; give at least one (bit width, share) with a share above 0.")
        if not (0 <= softness <= 1 and 0 <= soft_until <= 1):
            raise ValueError(f"softness is {softness} and soft_until {soft_until}; both must be within 0 and 1.")
        if bool(softness) != bool(soft_until):
            raise ValueError("softness and soft_until go together: give both above 0, or neither.")
        if soft_until == 1:
            raise ValueError("soft_until is 1; the grid must be hard before training ends, so give less.")
        for name, value in (("stages", pairs), ("softness", softness), ("soft_until", soft_until)):
            object.__setattr__(self, name, value)

    @classmethod
    def preset(cls, name: str, bits: float = 4.0) -> BitSchedule:
        """A named schedule that ends at ``bits``.

        Names: "constant"; "paper" (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4 over 1, 1, 1, 1, 1, 2, 2, 2, 14 of 25
        epochs, arXiv 2510.14823); "integer" (8, 7, 6, 5, 4) and "simple" (16, 8, 4), which give the last width the
        same 14 of 25 epochs. For other final bits, the paper's widths are mapped linearly from 8..4 to 8..bits.
        """
        last = 14.0
        published = [(8, 1), (7, 1), (6, 1), (5.5, 1), (5, 1), (4.75, 2), (4.5, 2), (4.25, 2), (4, last)]
        if name == "constant":
            return cls([(bits, 1)])
        if name == "paper":
            return cls([(bits + (width - 4) * (8 - bits) / 4, share) for width, share in published])
        if name == "integer":
            above = [float(width) for width in range(8, math.ceil(bits), -1) if width > bits]
            return cls([*((width, 11 / len(above)) for width in above), (bits, last)])
        if name == "simple":
            return cls([(16, 5.5), (8, 5.5), (bits, last)])
        raise ValueError(f"bit schedule preset is {name!r}; allowed: 'constant', 'paper', 'integer', 'simple'.")

    @property
    def final_bits(self) -> float:
        """The bit width at the end of training."""
        return self.stages[-1][0]

    def bit_width(self, progress: float) -> float:
        """The bit width at ``progress`` in [0, 1]."""
        return self.stages[self.stage(progress)][0]

    def stage(self, progress: float) -> int:
        """Index of the stage at ``progress`` in [0, 1]."""
        total = sum(share for _, share in self.stages)
        position = _check_progress(progress) * total
        for index, (_, share) in enumerate(self.stages):
            position -= share
            if position < -1e-12 * total:  # step 3 of 25 is at 3.0000000000000004 or 2.9999999999999996
                return index
        return len(self.stages) - 1

    def softness_at(self, progress: float) -> float:
        """The softness of the staircase at ``progress`` in [0, 1]; 0 is the hard grid."""
        if not self.softness or _check_progress(progress) >= self.soft_until:
            return 0.0
        return self.softness * (1 - progress / self.soft_until)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a recipe or a checkpoint."""
        return {**asdict(self), "stages": [list(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BitSchedule:
        """The inverse of ``to_dict``; also takes ``{"preset": name, "bits": b, ...}``.

        Raises:
            ValueError: an unknown key, or neither stages nor a preset.
        """
        allowed = {"preset", "bits"} if "preset" in data else set()
        allowed |= {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - allowed):
            raise ValueError(
                f"unknown key in a bit schedule: {', '.join(unknown)}. Allowed: {', '.join(sorted(allowed))}."
            )
        if not {"preset", "stages"} & set(data):
            raise ValueError("a bit schedule needs stages, a list of [bit width, share], or the name of a preset.")
        rest = dict(data)
        if "preset" in rest:
            base = cls.preset(rest.pop("preset"), rest.pop("bits", 4.0))
            rest = {**base.to_dict(), **rest}
        return cls(**rest)


def _check_progress(progress: float) -> float:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it must be within 0 and 1.")
    return progress
