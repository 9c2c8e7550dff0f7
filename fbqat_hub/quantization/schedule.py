"""Bit schedules: training progress -> bit width. Progress runs from 0 (first step) to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fbqat_hub.quantization.fake_quantize import check_bit_width

# What a place in the schedule may miss its stage by, as a share of the whole.
_SLACK = 1e-12
# What is said of a share that no number of steps would come to.
_MOST_STEPS = 1e12


@dataclass(frozen=True)
class BitSchedule:
    """Bit width as a function of progress.

    Attributes:
        stages: (bit width, share of training) in order; shares are relative. One stage is a constant width.

    >>> BitSchedule.preset("paper").bit_width(0.25), BitSchedule.preset("paper").bit_width(0.44)
    (4.75, 4.0)
    """

    stages: tuple[tuple[float, float], ...]

    def __init__(self, stages: Sequence[tuple[float, float]]) -> None:
        pairs = tuple((check_bit_width(width), float(share)) for width, share in stages)
        if not pairs or not all(math.isfinite(share) and share > 0 for _, share in pairs):
            raise ValueError(f"stages are {list(stages)}; give at least one (bit width, share) with a share above 0.")
        if not math.isfinite(sum(share for _, share in pairs)):
            raise ValueError(f"stages are {list(stages)}; their shares are relative, and the sum of these is infinite.")
        object.__setattr__(self, "stages", pairs)

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

    @property
    def least_steps(self) -> int:
        """Of how many training steps, at least, one is at the last width.

        >>> BitSchedule([(8, 3), (4, 1)]).least_steps, BitSchedule.preset("constant").least_steps
        (4, 1)
        """
        total, last = sum(share for _, share in self.stages), self.stages[-1][1]
        return math.ceil(min(total / last * (1 - _SLACK), _MOST_STEPS))

    def check_steps(self, steps: int, name: str = "steps") -> None:
        """Raise ValueError where none of so many steps is at the last width, which is stored."""
        if steps < self.least_steps:
            width, share = self.stages[-1]
            raise ValueError(
                f"schedule.stages ends with [{width:g}, {share:g}], and {name} is {steps}, of which none is left for "
                f"it; give it a larger share, or at least {self.least_steps:,} steps."
            )

    def bit_width(self, progress: float) -> float:
        """The bit width at ``progress`` in [0, 1]."""
        return self.stages[self.stage(progress)][0]

    def stage(self, progress: float) -> int:
        """Index of the stage at ``progress`` in [0, 1]."""
        total = sum(share for _, share in self.stages)
        position = _check_progress(progress) * total
        for index, (_, share) in enumerate(self.stages):
            position -= share
            if position < -_SLACK * total:  # step 3 of 25 is at 3.0000000000000004 or 2.9999999999999996
                return index
        return len(self.stages) - 1


def _check_progress(progress: float) -> float:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it must be within 0 and 1.")
    return progress
