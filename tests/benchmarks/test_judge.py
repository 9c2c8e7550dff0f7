"""The judge's table: changes seed by seed, intervals, the worst caption, and only rows that the judge has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.method.judge import COMPARED, SHOWN, draw_widths, judge, judge_rows
from benchmarks.method.rows import OURS, Results


def row(method: str, seed: int, loss: float, track: str = "uniform-4", **more: Any) -> dict[str, Any]:
    named = {"family": "sana", "track": track, "method": method, "seed": seed, "steps": 400, "rate": 1e-4}
    return {**named, "sampler": loss, "sampler_by_caption": [0.5 * loss, 1.5 * loss], **more}


ROWS = [row("fbqat", 1, 0.010), row("fbqat", 2, 0.020), row(OURS, 1, 0.0098), row(OURS, 2, 0.0192)]


def line(title: str, rows: list[dict[str, Any]]) -> str:
    (found,) = [each for each in judge_rows(Results(rows)).splitlines() if each.startswith(f"| {title} |")]
    return found.split("|")[2].strip()


def test_losses_are_means_over_seeds() -> None:
    assert line("LSQ from GPTQ codes", ROWS) == "15.00 ± 7.07"
    assert line("LSQ from GPTQ codes", ROWS[:1]) == "10.00"


def test_changes_are_seed_by_seed_with_an_interval() -> None:
    assert line("soft staircase, 4 bits", ROWS) == "-3.0% (-15.7 to +9.7)"  # -2 and -4; t of one degree of freedom
    assert line("soft staircase, 4 bits", ROWS[:3]) == "-2.0% (one seed)"


def test_the_worst_caption_stands_beside_the_mean() -> None:
    assert line("worst caption: LSQ from GPTQ codes", ROWS) == "22.5 (1.5 times the mean)"


def test_rows_that_the_judge_has_not_seen_do_not_count() -> None:
    unseen = {name: value for name, value in row("fbqat", 3, 9.0).items() if not name.startswith("sampler")}
    assert judge_rows(Results([*ROWS, unseen])) == judge_rows(Results(ROWS))
    assert judge(Results([unseen])) == ""
    assert judge_rows(Results([*ROWS, row("fbqat", 3, 9.0, steps=200)])) == judge_rows(Results(ROWS))


def test_what_is_compared_is_shown() -> None:
    assert {title for pair in COMPARED.values() for title in pair} <= set(SHOWN)


def test_widths_are_drawn_from_the_rows(tmp_path: Path) -> None:
    wide = row("ptq-gptq", 1, 0.005, "mixed-4.5", widths={"blocks.0.to_q": 8, "blocks.1.to_q": 4})
    draw_widths(Results([*ROWS, wide]), tmp_path / "widths.png")
    with Image.open(tmp_path / "widths.png") as picture:
        assert (209, 103, 31) in {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
