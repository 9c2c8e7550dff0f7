"""The curve of size against loss: changes are of half a stored bit and seed by seed, the knee is of validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.method.rows import OURS, Results
from benchmarks.method.widths import curve, draw_curve, half_bits, knee


def row(track: str, method: str, seed: int, bits: float, test: float, validation: float) -> dict[str, Any]:
    named = {"family": "sana", "track": track, "method": method, "seed": seed, "steps": 400, "rate": 1e-4}
    return {**named, "bits_per_weight": bits, "test": test, "validation": validation}


# per stored bit the loss falls to a quarter, then by nothing
ROWS = [
    row("uniform-4", OURS, 1, 4.2, 8.0, 16.0),
    row("uniform-4", OURS, 2, 4.2, 4.0, 16.0),
    row("uniform-4", "ptq-gptq", 1, 4.2, 16.0, 32.0),
    row("mixed-5", OURS, 1, 5.2, 2.0, 4.0),
    row("mixed-8", OURS, 1, 8.2, 2.0, 2.0),
]


def line(table: str, title: str) -> str:
    (found,) = [each for each in table.splitlines() if each.startswith(f"| {title} |")]
    return found


def test_changes_are_for_half_a_bit_at_the_seeds_that_both_have() -> None:
    rows = [row("mixed-4.5", OURS, 1, 4.7, 4.0, 9.0), *ROWS]
    assert "-50% (1)" in line(half_bits(Results(rows)), "each half bit, 4.5 to 5 on average, trained")
    assert "-50% (1)" in line(half_bits(Results(rows)), "training, at 4 on average")


def test_knee_is_where_validation_lies_furthest_below_the_line() -> None:
    assert knee(curve(Results(ROWS), "sana", OURS)) == 5.0
    flat = [{**each, "validation": 16.0} if each["track"] == "mixed-5" else each for each in ROWS]
    assert knee(curve(Results(flat), "sana", OURS)) != 5.0
    assert knee(curve(Results(ROWS[:3]), "sana", OURS)) is None


def test_plot_of_the_tracked_results_is_drawn(tmp_path: Path) -> None:
    draw_curve(Results.load(), tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > picture.height > 300
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
    assert {(214, 39, 40), (127, 127, 127), (31, 119, 180)} <= colours  # the lines, and the points of groups
