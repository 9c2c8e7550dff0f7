"""Stages placed by a curve have equal steps of its logarithm."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from fbqat_hub.quantization import BitSchedule
from fbqat_hub.quantization.auto_schedule import schedule_from_curve

# of the tiny Sana, learned clip
MEASURED = {8: 0.00135, 7: 0.00221, 6: 0.00494, 5.5: 0.00953, 5: 0.01757, 4.75: 0.0249, 4.5: 0.03602, 4: 0.0609}


def widths_of(schedule: BitSchedule) -> list[float]:
    return [width for width, _ in schedule.stages]


def test_an_exponential_curve_gives_equal_widths_and_the_published_last_share() -> None:
    """A loss of 4^-b: nine stages are half a bit apart; eight share 11/25, the last has 14/25."""
    schedule = schedule_from_curve({width: 4.0**-width for width in (8, 6.5, 4)})
    assert widths_of(schedule) == [8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5, 4]
    assert [share for _, share in schedule.stages] == pytest.approx([0.055] * 8 + [0.56])
    assert schedule.bit_width(0.44 - 1e-6) == 4.5
    assert schedule.bit_width(0.44) == 4


@pytest.mark.parametrize("stages", [2, 3, 9, 20])
def test_steps_of_the_logarithm_are_equal(stages: int) -> None:
    """To the hundredth of a bit that widths are rounded to; the curve's steepest part is 1.5 a bit."""
    schedule = schedule_from_curve(MEASURED, stages)
    points = sorted(MEASURED, reverse=True)

    def log_at(width: float) -> float:
        left = max(index for index, point in enumerate(points[:-1]) if point >= width)
        done = (points[left] - width) / (points[left] - points[left + 1])
        a, b = (math.log(MEASURED[point]) for point in points[left : left + 2])
        return a + done * (b - a)

    logs = [log_at(width) for width in widths_of(schedule)]
    total = math.log(0.0609 / 0.00135)
    assert [after - before for before, after in pairwise(logs)] == pytest.approx(
        [total / (stages - 1)] * (stages - 1), abs=0.015
    )
    assert (widths_of(schedule)[0], schedule.final_bits) == (8, 4)


def test_order_and_scale_of_the_curve_do_not_matter() -> None:
    turned = {width: 1000 * MEASURED[width] for width in sorted(MEASURED)}
    assert schedule_from_curve(turned) == schedule_from_curve(MEASURED)


def test_last_share_is_the_share_at_the_last_width() -> None:
    schedule = schedule_from_curve(MEASURED, stages=4, last_share=0.25)
    assert [schedule.bit_width(progress) > 4 for progress in (0.7499, 0.75)] == [True, False]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({8: 1, 6: 0.5, 4: 16}, [8, 5.5, 5, 4.5, 4]),  # 6 bits are no better than 8: raised to 1
        ({8: 1, 5: 16, 4: 8}, [8, 7.25, 6.5, 5.75, 4]),  # 4 bits are no better than 5: raised to 16
    ],
)
def test_noise_in_the_curve_is_made_monotone(curve: dict[float, float], expected: list[float]) -> None:
    assert widths_of(schedule_from_curve(curve, stages=5)) == expected


@pytest.mark.parametrize(
    ("curve", "options", "message"),
    [
        ({8: 1.0}, {}, "at least two bit widths"),
        ({8: 0.0, 4: 1.0}, {}, "loss above 0"),
        ({8: 1.0, 4: math.nan}, {}, "loss above 0"),
        ({8: 1.0, 6: 1.0, 4: 0.9}, {}, "does not rise from 8 to 4 bits"),
        ({8: 1.0, 4: 2.0}, {"stages": 1}, "stages is 1; at least 2"),
        ({8: 1.0, 4: 2.0}, {"last_share": 1.0}, "last_share is 1.0"),
        ({8: 1.0, 1: 2.0}, {}, "bit width is 1"),
    ],
)
def test_curves_that_are_refused(curve: dict[float, float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from_curve(curve, **options)
