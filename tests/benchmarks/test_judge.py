"""The judge's table and the findings: means, changes seed by seed, and only rows that the metric is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.method.findings import CHOICES, JUDGED, OLDER, Finding, Side, findings
from benchmarks.method.judge import SHOWN, draw_widths, judge, judge_rows
from benchmarks.method.rows import Results
from benchmarks.method.runs import FLOORS, METHODS, TRACKS, VARIANTS


def row(method: str, seed: int, loss: float, track: str = "uniform-4", **more: Any) -> dict[str, Any]:
    named = {"family": "sana", "track": track, "method": method, "seed": seed, "steps": 400, "rate": 1e-4}
    return {**named, "sampler": loss, "validation": loss, "sampler_by_caption": [0.5 * loss, 1.5 * loss], **more}


ROWS = [row("fbqat", 1, 0.010), row("fbqat", 2, 0.020), row("lsq-qat", 1, 0.0125), row("lsq-qat", 2, 0.032)]
AGAINST_LSQ = Finding("start", Side("uniform-4", "fbqat"), Side("uniform-4", "lsq-qat"))


def line(table: str, title: str) -> str:
    (found,) = [each for each in table.splitlines() if each.startswith(f"| {title} |")]
    return found.split("|")[2].strip()


def test_losses_are_means_over_seeds() -> None:
    assert line(judge_rows(Results(ROWS)), "default, 4 bits") == "15.00 ± 7.07"
    assert line(judge_rows(Results(ROWS[:1])), "default, 4 bits") == "10.00"


def test_changes_are_seed_by_seed_with_an_interval() -> None:
    assert AGAINST_LSQ.changes(Results(ROWS), "sana") == pytest.approx([-20, -37.5])
    assert line(findings(Results(ROWS), [AGAINST_LSQ]), "start") == "-29% (-140 to +82)"  # t of one degree of freedom
    assert line(findings(Results(ROWS[:3]), [AGAINST_LSQ]), "start") == "-20% (one seed)"
    assert findings(Results(ROWS[:2]), [AGAINST_LSQ]).count("\n") == 2  # no row


def test_pictures_are_compared_in_db() -> None:
    of_pictures = AGAINST_LSQ._replace(metric="psnr")
    rows = [{**each, "psnr": value} for each, value in zip(ROWS, (22.0, 25.0, 21.0, 23.0), strict=True)]
    assert of_pictures.changes(Results(rows), "sana") == [1.0, 2.0]
    assert line(findings(Results(rows), [of_pictures]), "start") == "+1.5 dB (-4.9 to +7.9)"
    assert line(findings(Results([*rows[:1], *ROWS[1:2], *rows[2:]]), [of_pictures]), "start") == "+1.0 dB (one seed)"


def test_a_side_is_at_its_best_rate_by_validation() -> None:
    worse = row("lsq-qat", 1, 0.001, rate=2e-4, validation=9.0)
    assert AGAINST_LSQ.changes(Results([*ROWS, worse]), "sana") == pytest.approx([-20, -37.5])


def test_codes_without_training_stand_for_every_seed() -> None:
    nearest = row("ptq-mse", 1, 0.040, steps=0, rate=0.0)
    against = Finding("training", Side("uniform-4", "fbqat"), Side("uniform-4", "ptq-mse", 0))
    assert against.changes(Results([*ROWS, nearest]), "sana") == pytest.approx([-75, -50])


def test_the_worst_caption_stands_beside_the_mean() -> None:
    worst = judge(Results(ROWS)).split("loss of the worst caption")[1]
    assert line(worst, "default, 4 bits") == "22.5 (1.5 times the mean)"


def test_rows_that_the_judge_has_not_seen_do_not_count() -> None:
    unseen = {name: value for name, value in row("fbqat", 3, 9.0).items() if not name.startswith("sampler")}
    assert judge_rows(Results([*ROWS, unseen])) == judge_rows(Results(ROWS))
    assert judge(Results([unseen])) == ""
    assert judge_rows(Results([*ROWS, row("fbqat", 3, 9.0, steps=200)])) == judge_rows(Results(ROWS))


def test_every_finding_names_a_track_and_a_method() -> None:
    gone = {"fbqat staircase"}  # whose rows stay
    sides = [side for finding in (*JUDGED, *CHOICES, *OLDER) for side in (finding.changed, finding.against)]
    for track, method in [*((side.track, side.method) for side in sides), *SHOWN.values()]:
        assert track in {*TRACKS, "w4a8"}
        assert method in {*METHODS, *VARIANTS, *FLOORS, *gone}


def test_widths_are_drawn_from_the_rows(tmp_path: Path) -> None:
    wide = row("ptq-gptq", 1, 0.005, "mixed-4.5", widths={"blocks.0.to_q": 8, "blocks.1.to_q": 4})
    draw_widths(Results([*ROWS, wide]), tmp_path / "widths.png")
    with Image.open(tmp_path / "widths.png") as picture:
        assert (209, 103, 31) in {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
