"""Widths chosen by measurement: stages placed by the loss they cost, and left when the loss has settled."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from fbqat_hub.quantization.schedule import BitSchedule


def schedule_from_curve(curve: Mapping[float, float], stages: int = 9, last_share: float = 14 / 25) -> BitSchedule:
    """Stages from the curve's largest bit width to its smallest, at equal steps of the logarithm of the loss.

    The loss is near exponential in the width, so equal steps of the loss itself crowd between 5 and 4 bits. On the tiny
    Sana (200 steps, max-abs scale) they ended 2.3% and 4.2% above these in validation loss, with two seeds.

    Args:
        curve: bit width -> held-out loss of the student before training, at least two widths. Between them the
            logarithm of the loss is linear in the width; a loss below that of a larger width is noise, and is raised
            to it.
        stages: how many, at least 2. All but the last have equal shares.
        last_share: share of training at the smallest width, between 0 and 1; the published one by default.

    Returns:
        Widths to a hundredth of a bit.

    Raises:
        ValueError: an argument out of range, or a loss that does not rise as the width falls.

    >>> [width for width, _ in schedule_from_curve({8: 0.001, 6: 0.01, 4: 0.1}, stages=5).stages]
    [8.0, 7.0, 6.0, 5.0, 4.0]
    """
    if len(curve) < 2 or not all(math.isfinite(loss) and loss > 0 for loss in curve.values()):
        raise ValueError(f"the curve is {dict(curve)}; give at least two bit widths, each with a loss above 0.")
    if stages < 2:
        raise ValueError(f"stages is {stages}; at least 2 are needed, the first width and the last.")
    if not 0 < last_share < 1:
        raise ValueError(f"last_share is {last_share}; it must be between 0 and 1.")
    widths = sorted(curve, reverse=True)
    logs = list(accumulate((math.log(curve[width]) for width in widths), max))
    if logs[0] == logs[-1]:
        raise ValueError(
            f"the loss does not rise from {widths[0]:g} to {widths[-1]:g} bits, so no stage can be placed by it."
        )

    def width_at(log: float) -> float:
        """The largest width that costs this much."""
        right = bisect_left(logs, log, lo=1)
        done = (log - logs[right - 1]) / (logs[right] - logs[right - 1])
        return widths[right - 1] + done * (widths[right] - widths[right - 1])

    step = (logs[-1] - logs[0]) / (stages - 1)
    above = [round(width_at(logs[0] + index * step), 2) for index in range(1, stages - 1)]
    share = round((1 - last_share) / (stages - 1), 12)  # 0.055, not 0.05499999999999999
    return BitSchedule([*((width, share) for width in (widths[0], *above)), (widths[-1], last_share)])


@dataclass
class AdaptiveSchedule:
    """A bit schedule whose stages end early, when the training loss has settled.

    A stage ends when its last ``window`` losses have fallen by less than ``threshold``, on the least-squares line
    through their logarithms; at the latest it ends where ``schedule`` ends it. So the last width has at least its share
    of training, and no width comes later than in ``schedule``. Softness stays a function of progress
    (``schedule.softness_at``).

    Single losses scatter. With a standard deviation s of their logarithm, the fall is known to about
    s * sqrt(12 / window): choose a window that makes this small.

    The state is plain data: ``AdaptiveSchedule.from_dict(a.to_dict()) == a``. It belongs into a checkpoint.

    Attributes:
        schedule: the stages, in steps (no ramp), and their latest ends.
        steps: of the whole training.
        window: losses looked at, at least 2; a stage is never shorter, unless ``schedule`` has it so.
        threshold: the relative fall over a window that counts as settled, e.g. 0.05; below 0 nothing is.
        step: updates so far.
        stage: index of the current stage.
        losses: of the current stage, the last ``window``.

    >>> adaptive = AdaptiveSchedule(BitSchedule([(8, 1), (6, 1), (4, 2)]), steps=40, window=4)
    >>> [adaptive.update(loss) for loss in (0.9, 0.5, 0.5, 0.5, 0.5)]    # settled after the fifth
    [8.0, 8.0, 8.0, 8.0, 6.0]
    """

    schedule: BitSchedule
    steps: int
    window: int
    threshold: float = 0.05
    step: int = 0
    stage: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.schedule.ramp != "steps":
            raise ValueError(f"the schedule's ramp is {self.schedule.ramp!r}; only 'steps' has stages that can end.")
        shares = [share for _, share in self.schedule.stages]
        longest = max(shares[:-1], default=0.0) / sum(shares) * self.steps
        if not 2 <= self.window <= longest:
            raise ValueError(
                f"window is {self.window} steps; it must be at least 2 and fit into the longest stage before the last, "
                f"which has {longest:g} of {self.steps} steps."
            )
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; it must be a finite number, e.g. 0.05.")

    @property
    def bit_width(self) -> float:
        """The bit width of the next step."""
        return self.schedule.stages[self.stage][0]

    def update(self, loss: float) -> float:
        """Take the training loss of the step just made; returns the bit width of the next one.

        Args:
            loss: finite, not below 0; the same number on all processes, so that all change width together.
        """
        if not (math.isfinite(loss) and loss >= 0):
            raise ValueError(f"the loss of step {self.step + 1} is {loss}; it must be a finite number of at least 0.")
        self.step += 1
        self.losses = [*self.losses, loss][-self.window :]
        last = len(self.schedule.stages) - 1
        wanted = min(last, self.stage + self._has_settled())
        latest = self.schedule.stage(min(1.0, self.step / self.steps))
        if (stage := max(wanted, latest)) != self.stage:
            self.stage, self.losses = stage, []
        return self.bit_width

    def _has_settled(self) -> bool:
        if len(self.losses) < self.window:
            return False
        logs = [math.log(max(loss, 1e-30)) for loss in self.losses]
        middle = (self.window - 1) / 2
        slope = sum((index - middle) * log for index, log in enumerate(logs)) / sum(
            (index - middle) ** 2 for index in range(self.window)
        )
        return 1 - math.exp(slope * (self.window - 1)) < self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {**asdict(self), "schedule": self.schedule.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdaptiveSchedule:
        """The inverse of ``to_dict``."""
        return cls(**{**data, "schedule": BitSchedule.from_dict(data["schedule"])})
