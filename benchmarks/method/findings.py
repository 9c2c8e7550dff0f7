"""The findings of docs/method.md: what each part of the method changes, seed by seed, from the rows.

A finding compares the loss of two methods at the seeds that both have, each at its best setting. Its metric is the
judge's loss where the rows have it, else that of the test split, in rows of before there was a judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.method.rows import BLOCKS, FAMILIES, OURS, Results, Row, by_family, interval_of

UNIFORM, MIXED = "uniform-4", "mixed-4.5"
# Their codes are the same for every seed, so one row stands for all.
_OF_NO_SEED = ("ptq-maxabs", "ptq-mse")


class Side(NamedTuple):
    """A method on a track, at its best setting there.

    Attributes:
        track: one, or "w4a8" for all layers trained or the blocks, whichever is better.
        alone: only this very track.
    """

    track: str
    method: str
    steps: int = 400
    alone: bool = True

    def rows(self, results: Results, family: str, metric: str) -> dict[int, Row]:
        """Seed -> row with that metric."""
        if not self.alone:
            chosen = results.named(self.track, self.steps).at_best(family=family, method=self.method)
        else:
            found = results.of(family=family, track=self.track, method=self.method)
            chosen = Results(row for row in found if row["steps"] in (0, self.steps) and metric in row).at_best()
        return {row["seed"]: row for row in chosen if metric in row}


class Finding(NamedTuple):
    """What is asked, the two sides, and the metric: "sampler" (the judge's), "test", or "psnr" of pictures."""

    question: str
    changed: Side
    against: Side
    metric: str = "sampler"

    def changes(self, results: Results, family: str) -> list[float]:
        """The loss of ``changed`` against the other's, in %, or the gain in dB, one a seed that both have."""
        new, old = (side.rows(results, family, self.metric) for side in (self.changed, self.against))
        if self.against.method in _OF_NO_SEED and old:
            old = dict.fromkeys(new, next(iter(old.values())))
        both = sorted(set(new) & set(old))
        if self.metric == "psnr":
            return [new[seed]["psnr"] - old[seed]["psnr"] for seed in both]
        return [100 * (new[seed][self.metric] / old[seed][self.metric] - 1) for seed in both]


DEFAULT = Side(UNIFORM, "fbqat")
RELATIVE = Side(UNIFORM, "fbqat relative")
HALF_A_BIT = Side(MIXED, "fbqat")
GROUPS = Side("train-blocks-groups-weighted", "fbqat")
PROMPTED = Side("prompts-4.5", "fbqat")
GPTQ_HALF_A_BIT = Side(MIXED, "ptq-gptq", 0)
JUDGED = (
    Finding("training, 4 bits: against GPTQ", DEFAULT, Side(UNIFORM, "ptq-gptq", 0)),
    Finding("training, 4 bits: against nearest codes, MSE clip", DEFAULT, Side(UNIFORM, "ptq-mse", 0)),
    Finding("GPTQ codes to start from: against LSQ", DEFAULT, Side(UNIFORM, "lsq-qat")),
    Finding("relative rates, 1.3e-3 on all: against the best of one rate for all layers", RELATIVE, DEFAULT),
    Finding("a learned clip: LSQ against vanilla QAT", Side(UNIFORM, "lsq-qat"), Side(UNIFORM, "vqat")),
    Finding("at 4.2 stored bits: against torchao's QAT at 5.0 to 5.1", DEFAULT, Side(UNIFORM, "torchao-qat")),
    Finding("4.5 bits on average: against 4", HALF_A_BIT, DEFAULT),
    Finding("the same, PSNR of pictures to the teacher's", HALF_A_BIT, DEFAULT, "psnr"),
    Finding("4.5 bits on average, GPTQ not trained: against trained 4", GPTQ_HALF_A_BIT, DEFAULT),
    Finding("at 4.7 stored bits: against torchao's QAT at 5.0 to 5.1", HALF_A_BIT, Side(UNIFORM, "torchao-qat")),
    Finding("at 4.7 stored bits: against the default in groups of 32, at 5.0 to 5.1", HALF_A_BIT, GROUPS),
    Finding("groups of 32: against torchao's QAT, which has them", GROUPS, Side(UNIFORM, "torchao-qat")),
    Finding("training, 4.5 bits on average: against GPTQ", HALF_A_BIT, GPTQ_HALF_A_BIT),
    Finding("W3A8: against LSQ", Side("hard-w3a8", "fbqat"), Side("hard-w3a8", "lsq-qat")),
    Finding("W4A4: against LSQ", Side("hard-w4a4", "fbqat"), Side("hard-w4a4", "lsq-qat")),
    Finding(
        "one static range per layer, of what was seen: against LSQ",
        Side("hard-static-min-max", "fbqat"),
        Side("hard-static-min-max", "lsq-qat"),
    ),
    Finding(
        "one static range per layer, GPTQ: what was seen against mean ± 3 sigma",
        Side("hard-static-min-max", "ptq-gptq", 0),
        Side("hard-static", "ptq-gptq", 0),
    ),
    Finding(
        "one static range per layer by mean ± 3 sigma: against LSQ",
        Side("hard-static", "fbqat"),
        Side("hard-static", "lsq-qat"),
    ),
    Finding(
        "a teacher with outlier channels: against LSQ", Side("hard-outliers", "fbqat"), Side("hard-outliers", "lsq-qat")
    ),
    Finding("prompts alone, 4.5 bits on average: against pictures", PROMPTED, HALF_A_BIT),
    Finding("the same, over noised pictures of the test split", PROMPTED, HALF_A_BIT, "test"),
    Finding("the soft staircase, 4 bits (left the code)", Side(UNIFORM, OURS), DEFAULT),
)
CHOICES = (
    Finding("8 bits by the weights alone", Side(MIXED, "ptq-gptq by weights", 0), GPTQ_HALF_A_BIT),
    Finding("8 bits by SDNQ's threshold", Side(MIXED, "ptq-gptq by SDNQ's threshold", 0), GPTQ_HALF_A_BIT),
    Finding(
        "8 bits for the first and last layer: against Gauss-Newton at these bits",
        Side(MIXED, "ptq-gptq first and last", 0),
        Side(MIXED, "ptq-gptq as first and last", 0),
    ),
    Finding("8 bits by learned widths, GPTQ", Side(MIXED, "ptq-gptq learned widths", 0), GPTQ_HALF_A_BIT),
    Finding("8 bits by learned widths, trained", Side(MIXED, "fbqat learned widths"), HALF_A_BIT),
    Finding("layers fall one by one from 8 bits, as many steps in all", Side(MIXED, "fbqat falling"), HALF_A_BIT),
)
_LSQ, _VQAT = "lsq-qat", "vqat"
OLDER = (
    Finding(
        "the published widths: against 4 bits from the start, all layers, annealed",
        Side("w4a8", "fbqat-paper"),
        Side("w4a8", _VQAT),
        "test",
    ),
    Finding(
        "the same at a constant rate, as published", Side("constant", "fbqat-paper"), Side("constant", _VQAT), "test"
    ),
    Finding("only the blocks trained: LSQ against LSQ on all layers", Side(BLOCKS, _LSQ), Side("w4a8", _LSQ), "test"),
    Finding("loss weights, LSQ", Side(f"{BLOCKS}-weighted", _LSQ), Side(BLOCKS, _LSQ), "test"),
    Finding("W3A8: against LSQ", Side("w3a8", OURS), Side("w3a8", _LSQ), "test"),
    Finding("one static range per layer: against LSQ", Side("static", OURS), Side("static", _LSQ), "test"),
    Finding("a teacher with outlier channels: against LSQ", Side("outliers", OURS), Side("outliers", _LSQ), "test"),
    Finding("1600 steps: against LSQ", Side("w4a8", OURS, 1600, False), Side("w4a8", _LSQ, 1600, False), "test"),
    Finding(
        "groups of 32: against torchao's QAT, which has them",
        Side("groups", OURS, 400, False),
        Side("groups", "torchao-qat", 400, False),
        "test",
    ),
)


def findings(results: Results, chosen: Sequence[Finding]) -> str:
    """A row per finding: the change of the loss with its 95% interval over seeds, a column per family."""
    cells: dict[str, dict[str, str]] = {}
    for finding in chosen:
        for family in FAMILIES:
            if changes := finding.changes(results, family):
                digits, unit = (1, " dB") if finding.metric == "psnr" else (0, "%")
                cells.setdefault(finding.question, {})[family] = interval_of(changes, digits, unit)
    return by_family("change of the loss (95% interval)", cells)
