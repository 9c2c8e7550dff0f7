"""Bit schedules: the published shares, presets and what they refuse."""

from __future__ import annotations

import math

import pytest

from fbqat_hub.quantization import BitSchedule

PAPER = [8, 7, 6, 5.5, 5] + [4.75] * 2 + [4.5] * 2 + [4.25] * 2 + [4] * 14  # a width an epoch
INTEGER = [8, 7, 6, 5]


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 16, 1000])
def test_paper_preset_gives_each_epoch_its_width(steps_per_epoch: int) -> None:
    schedule = BitSchedule.preset("paper")
    steps = 25 * steps_per_epoch
    widths = [schedule.bit_width(step / steps) for step in range(steps)]
    assert widths == [width for width in PAPER for _ in range(steps_per_epoch)]
    assert schedule.bit_width(1.0) == schedule.final_bits == 4


def test_integer_and_simple_presets_give_4_bits_the_same_14_epochs() -> None:
    integer, simple = BitSchedule.preset("integer"), BitSchedule.preset("simple")
    assert [integer.bit_width((index + 0.5) * 2.75 / 25) for index in range(4)] == INTEGER
    assert [simple.bit_width(progress) for progress in (0, 0.21, 0.23, 0.43)] == [16, 16, 8, 8]
    for schedule in (integer, simple):
        assert schedule.bit_width(11 / 25 - 1e-6) > 4
        assert schedule.bit_width(11 / 25) == 4


def test_constant_preset() -> None:
    assert {BitSchedule.preset("constant", 3).bit_width(progress) for progress in (0, 0.5, 1)} == {3}


@pytest.mark.parametrize("bits", [2, 3, 3.5, 5, 8])
@pytest.mark.parametrize("name", ["paper", "integer", "simple"])
def test_presets_for_other_final_bits(name: str, bits: float) -> None:
    schedule = BitSchedule.preset(name, bits)
    widths = [schedule.bit_width(step / 25) for step in range(26)]
    assert schedule.final_bits == bits
    assert widths == sorted(widths, reverse=True)
    if bits < 8:
        assert widths[10] > bits
        assert widths[11:] == [bits] * 15


def test_paper_widths_for_3_bits_are_mapped_linearly() -> None:
    widths = [width for width, _ in BitSchedule.preset("paper", 3).stages]
    assert widths == [3 + (width - 4) * 5 / 4 for width in sorted(set(PAPER), reverse=True)]
    assert [width for width, _ in BitSchedule.preset("integer", 3).stages] == [8, 7, 6, 5, 4, 3]


@pytest.mark.parametrize("share", [0.1, 1 / 3, 2.75, 1e5])
def test_a_stage_begins_at_its_step_whatever_the_rounding(share: float) -> None:
    """Ten stages, ten steps: sums of shares such as 0.1 miss the boundaries by a rounding error."""
    schedule = BitSchedule([(12.0 - index, share) for index in range(10)])
    assert [schedule.bit_width(step / 10) for step in range(10)] == [12 - step for step in range(10)]
    assert [schedule.stage(step / 10) for step in (*range(10), 10)] == [*range(10), 9]


def test_shares_are_relative() -> None:
    one, other = (BitSchedule([(6, share), (4, 3 * share)]) for share in (0.1, 500.0))
    for progress in (0, 0.2, 0.25 - 1e-9, 0.25, 1):
        assert one.bit_width(progress) == other.bit_width(progress) == (6 if progress < 0.25 else 4)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one"),
        ([[4, 0]], "share above 0"),
        ([[4, math.inf]], "share above 0"),
        ([[1.5, 1]], "bit width is 1.5"),
        ([[math.nan, 1]], "bit width is nan"),
    ],
)
def test_stages_that_are_none_are_refused(stages: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitSchedule(stages)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="'constant', 'paper', 'integer', 'simple'"):
        BitSchedule.preset("papers")


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_out_of_range_is_refused(progress: float) -> None:
    with pytest.raises(ValueError, match="progress"):
        BitSchedule([(4, 1)]).bit_width(progress)
