"""The rows of the method benchmark, chosen and put into tables; what its pages share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.method.__main__ import RESULTS, read
from benchmarks.method.runs import PICTURES
from fbqat_hub import families
from fbqat_hub.evaluation.results import METHODS

# Those that were measured, with their titles.
FAMILIES = {name: family.title for name, family in families.FAMILIES.items() if (RESULTS / f"{name}.json").exists()}
# The default when these rows were measured, by fbqat_hub 0.1; this version cannot remake them. "fbqat", in the judge's
# table, is the default as it is now.
OURS = "fbqat staircase"
TITLES = {**METHODS, OURS: "LSQ from GPTQ codes, soft staircase"}
BLOCKS = "train-blocks"
# Tracks whose best setting counts as one: a method trains what suits it.
_JOINED = {
    "w4a8": ("w4a8", BLOCKS, f"{BLOCKS}-weighted"),
    "groups": ("groups", f"{BLOCKS}-groups", f"{BLOCKS}-groups-weighted"),
}
# Student's t at 97.5% for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Row = dict[str, Any]


class Results:
    """The rows of all families; what is asked for at a method's best setting comes from there alone."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    @classmethod
    def load(cls, folder: Path = RESULTS) -> Results:
        """Every family's file in ``folder``; what was measured over fewer pictures than now is left out."""
        rows = [row for family in FAMILIES for row in read(folder / f"{family}.json")]
        for row in rows:
            if row.get("pictures", PICTURES) != PICTURES:
                del row["fd"], row["psnr"]
        return cls(rows)

    def of(self, **fields: Any) -> list[Row]:
        """The rows with these fields."""
        return [row for row in self.rows if all(row[name] == value for name, value in fields.items())]

    def distinct(self, name: str, **fields: Any) -> list[Any]:
        """The values of one field among these rows, in order of appearance."""
        return list(dict.fromkeys(row[name] for row in self.of(**fields)))

    def named(self, track: str = "w4a8", steps: int = 400) -> Results:
        """Of one track and budget: the methods, without the forms that were tried; all layers trained, or the blocks.

        torchao's QAT has groups of 32 in its rows of W4A8.
        """
        tracks = _JOINED.get(track, (track,))
        return Results(
            row
            for row in self.rows
            if row["steps"] in (0, steps)
            and row["method"] in TITLES
            and row["track"] in (_JOINED["w4a8"] if (track, row["method"]) == ("groups", "torchao-qat") else tracks)
        )

    def at_best(self, **fields: Any) -> list[Row]:
        """Of one method and budget: its rows at the setting with the least validation loss at the first seed."""
        rows = self.of(**fields)
        if not rows:
            return []
        first = [row for row in rows if row["seed"] == min(row["seed"] for row in rows)]
        best = min(first, key=lambda row: row["validation"])
        same = (row for row in rows if (row["track"], row["rate"]) == (best["track"], best["rate"]))
        return sorted(same, key=lambda row: row["seed"])


def by_family(first: str, cells: Mapping[str, Mapping[str, str]], columns: Mapping[str, str] = FAMILIES) -> str:
    """A Markdown table: row title -> column -> text, without the rows and columns that are empty."""
    shown = [column for column in columns if any(column in row for row in cells.values())]
    rows = [[title, *(row.get(column, "–") for column in shown)] for title, row in cells.items() if row]
    return markdown([first, *(columns[column] for column in shown)], rows) + "\n"


def interval_of(values: Sequence[float], digits: int, unit: str) -> str:
    """Mean and Student's t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}{unit} (one seed)"
    half = _T[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.{digits}f}{unit} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
