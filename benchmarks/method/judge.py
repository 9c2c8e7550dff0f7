"""The judge's table: methods over draws of the teacher's sampler, what they gain, and what no method can beat."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.method.rows import FAMILIES, OURS, TITLES, Results, by_family, interval_of
from fbqat_hub.evaluation.pictures import widths_picture

STEPS = 400
# Title -> track and method.
SHOWN: dict[str, tuple[str, str]] = {
    "GPTQ, not trained": ("uniform-4", "ptq-gptq"),
    TITLES["lsq-qat"]: ("uniform-4", "lsq-qat"),
    "LSQ from GPTQ codes": ("uniform-4", "fbqat"),
    "LSQ from GPTQ codes, soft staircase": ("uniform-4", OURS),
    "GPTQ, not trained, 4.5 bits on average": ("mixed-4.5", "ptq-gptq"),
    "LSQ from GPTQ codes, 4.5 bits on average": ("mixed-4.5", "fbqat"),
    "LSQ from GPTQ codes, soft staircase, 4.5 bits on average": ("mixed-4.5", OURS),
    "float weights, 8-bit activations": ("uniform-4", "activations alone"),
    "the teacher in bfloat16": ("uniform-4", "bfloat16"),
}
# What is compared: title -> changed, against.
COMPARED: dict[str, tuple[str, str]] = {
    "GPTQ codes: LSQ from them against LSQ": ("LSQ from GPTQ codes", TITLES["lsq-qat"]),
    "soft staircase, 4 bits": ("LSQ from GPTQ codes, soft staircase", "LSQ from GPTQ codes"),
    "soft staircase, 4.5 bits": (
        "LSQ from GPTQ codes, soft staircase, 4.5 bits on average",
        "LSQ from GPTQ codes, 4.5 bits on average",
    ),
    "half a bit on average": ("LSQ from GPTQ codes, 4.5 bits on average", "LSQ from GPTQ codes"),
    "half a bit on average, GPTQ": ("GPTQ, not trained, 4.5 bits on average", "GPTQ, not trained"),
}


def judge(results: Results) -> str:
    """The section of the page; nothing where the judge has seen no row."""
    if not any(judged(results, family, title) for family in FAMILIES for title in SHOWN):
        return ""
    return f"\n## The judge: draws of the sampler, {STEPS} steps\n\n{_HEAD}\n{judge_rows(results)}"


_HEAD = """The squared distance of student and teacher where the sampler asks them: at the latents that the teacher's
own sampler passes through, with and without the prompt where it guides, for the 89 captions of OpenMoji's test split,
on which neither was trained; at least 2,000 draws a family, the same for every method and seed. Blocks trained, the
loss weighted on PixArt-Sigma, a learning rate of 1e-4 (SD3.5: 5e-5). With 4.5 bits on average, layers of 8 bits are
chosen in one pass of Gauss-Newton over 100 training samples. Made by `python -m benchmarks.method --tracks uniform-4
mixed-4.5 --methods ptq-gptq lsq-qat fbqat 'fbqat staircase' --rates RATE --fixed-rates --no-pictures`.
"""


def judged(results: Results, family: str, title: str) -> dict[int, dict[str, Any]]:
    """Seed -> row of one of ``SHOWN``, where the judge has seen it."""
    track, method = SHOWN[title]
    rows = results.of(family=family, track=track, method=method)
    return {row["seed"]: row for row in rows if "sampler" in row and row["steps"] in (0, STEPS)}


def judge_rows(results: Results) -> str:
    """Losses, then changes with 95% intervals over seeds, then the worst caption."""
    found = {(family, title): judged(results, family, title) for family in FAMILIES for title in SHOWN}
    losses: dict[str, dict[str, str]] = {title: {} for title in SHOWN}
    changes: dict[str, dict[str, str]] = {title: {} for title in COMPARED}
    worst: dict[str, dict[str, str]] = {}
    for (family, title), rows in found.items():
        if rows:
            values = [1e3 * row["sampler"] for row in rows.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            losses[title][family] = f"{statistics.fmean(values):.2f}{spread}"
    for family in FAMILIES:
        for title, (changed, against) in COMPARED.items():
            if values := _changes(found[family, changed], found[family, against]):
                changes[title][family] = interval_of(values, 1, "%")
        for title in ("LSQ from GPTQ codes", "LSQ from GPTQ codes, 4.5 bits on average"):
            if rows := found[family, title]:
                worst.setdefault(f"worst caption: {title}", {})[family] = _worst(rows)
    tables = [by_family("loss ×1e-3", losses), by_family("change of the loss (95% interval)", changes)]
    return "\n".join([*tables, by_family("loss of the worst caption ×1e-3", worst)])


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


def _changes(changed: Mapping[int, Mapping[str, Any]], against: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """In %, of each seed that both have."""
    both = sorted(set(changed) & set(against))
    return [100 * (changed[seed]["sampler"] / against[seed]["sampler"] - 1) for seed in both]


def _worst(rows: Mapping[int, Mapping[str, Any]]) -> str:
    """Its loss over all seeds, and over the mean caption's."""
    by_caption = [
        statistics.fmean(losses) for losses in zip(*(row["sampler_by_caption"] for row in rows.values()), strict=True)
    ]
    return f"{1e3 * max(by_caption):.1f} ({max(by_caption) / statistics.fmean(by_caption):.1f} times the mean)"
