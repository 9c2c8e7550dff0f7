"""The judge's table: methods over draws of the teacher's sampler, what they gain, and what no method can beat."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.method.findings import CHOICES, GROUPS, JUDGED, MIXED, UNIFORM, Side, findings
from benchmarks.method.rows import FAMILIES, TITLES, Results, by_family
from fbqat_hub.evaluation.pictures import widths_picture

STEPS = 400
# Title -> track and method.
SHOWN: dict[str, tuple[str, str]] = {
    TITLES["ptq-mse"]: (UNIFORM, "ptq-mse"),
    TITLES["ptq-gptq"]: (UNIFORM, "ptq-gptq"),
    TITLES["vqat"]: (UNIFORM, "vqat"),
    TITLES["lsq-qat"]: (UNIFORM, "lsq-qat"),
    TITLES["torchao-qat"]: (UNIFORM, "torchao-qat"),
    "default, 4 bits": (UNIFORM, "fbqat"),
    "default, 4 bits, groups of 32": (GROUPS.track, "fbqat"),
    f"{TITLES['ptq-gptq']}, 4.5 bits on average": (MIXED, "ptq-gptq"),
    "default, 4.5 bits on average": (MIXED, "fbqat"),
    "float weights, 8-bit activations": (UNIFORM, "activations alone"),
    "the teacher in bfloat16": (UNIFORM, "bfloat16"),
}
_WORST = ("default, 4 bits", "default, 4.5 bits on average")


def judge(results: Results) -> str:
    """The section of the page; nothing where the judge has seen no row."""
    if not any(judged(results, family, title) for family in FAMILIES for title in SHOWN):
        return ""
    parts = [_HEAD, judge_rows(results), findings(results, JUDGED), choices(results), _worst_captions(results)]
    return f"\n## The judge: draws of the sampler, {STEPS} steps\n\n" + "\n".join(parts)


_HEAD = """The squared distance of student and teacher where the sampler asks them: at the latents that the teacher's
own sampler passes through, with and without the prompt where it guides, for the 89 captions of OpenMoji's test split,
on which neither was trained; at least 2,000 draws a family, the same for every method and seed. Blocks trained, the
loss weighted on PixArt-Sigma. Each method has the learning rate that was best of those tried in the tables above, one
for all layers; the default 1e-4 (SD3.5: 5e-5, in groups of 32 1e-4). Recipes have relative rates now, which change the
loss of 4 bits by -2 to +1%. With 4.5 bits on average, layers of 8 bits are chosen in one pass of Gauss-Newton over 100
training samples. Made by `python -m benchmarks.method --tracks uniform-4 mixed-4.5 --methods METHOD --rates RATE
--fixed-rates --no-pictures`.
"""


def judged(results: Results, family: str, title: str) -> dict[int, dict[str, Any]]:
    """Seed -> row of one of ``SHOWN``, where the judge has seen it, at its best rate."""
    return Side(*SHOWN[title], STEPS).rows(results, family, "sampler")


def judge_rows(results: Results) -> str:
    """Losses: mean and standard deviation over seeds."""
    losses: dict[str, dict[str, str]] = {title: {} for title in SHOWN}
    for title, row in losses.items():
        for family in FAMILIES:
            if values := [1e3 * found["sampler"] for found in judged(results, family, title).values()]:
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                row[family] = f"{statistics.fmean(values):.2f}{spread}"
    return by_family("loss ×1e-3", losses)


def choices(results: Results) -> str:
    """Other ways to choose the layers of 8 bits, against the default's."""
    return findings(results, CHOICES)


def _worst_captions(results: Results) -> str:
    worst: dict[str, dict[str, str]] = {title: {} for title in _WORST}
    for title, row in worst.items():
        for family in FAMILIES:
            if found := judged(results, family, title):
                row[family] = _worst(found)
    return by_family("loss of the worst caption ×1e-3", worst)


def draw_widths(results: Results, path: Path) -> None:
    """Write the picture of the bits of each family's layers, at 4.5 on average and the first seed.

    They are chosen at GPTQ's codes, whether or not training follows.
    """
    rows = {
        title: results.of(family=family, track="mixed-4.5", method="ptq-gptq") for family, title in FAMILIES.items()
    }
    found = {title: [row for row in own if "widths" in row] for title, own in rows.items()}
    widths_picture(
        {title: min(own, key=lambda row: row["seed"])["widths"] for title, own in found.items() if own}, path
    )


def _worst(rows: Mapping[int, Mapping[str, Any]]) -> str:
    """Its loss over all seeds, and over the mean caption's."""
    by_caption = [
        statistics.fmean(losses) for losses in zip(*(row["sampler_by_caption"] for row in rows.values()), strict=True)
    ]
    return f"{1e3 * max(by_caption):.1f} ({max(by_caption) / statistics.fmean(by_caption):.1f} times the mean)"
