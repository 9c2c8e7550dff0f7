"""Two folders of pictures side by side: a table, a results file and a picture sheet."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fbqat_hub.evaluation.folders import PictureFolder, matched
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.evaluation.results import METRICS, command_line, machine, now, versions
from fbqat_hub.evaluation.suite import (
    DISTANCES,
    PAIRED,
    PROMPTED,
    SINGLE,
    NotMeasurableError,
    check_libraries,
    measure,
)
from fbqat_hub.files import whole
from fbqat_hub.inputs import checked_device, output_folder
from fbqat_hub.pictures import read_rgb
from fbqat_hub.progress import each
from fbqat_hub.text import columns

COMPARABLE = (*PAIRED, *DISTANCES, *PROMPTED, *SINGLE)
DEFAULT = ("psnr", "ssim", "fd")
# Rows of the picture sheet.
_SHOWN = 10


def compare(
    a: Path,
    b: Path,
    output: Path | None = None,
    metrics: Sequence[str] = DEFAULT,
    *,
    device: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure the pictures of ``a`` against those of the same names in ``b``, the reference.

    Args:
        a: a folder of pictures, or of a run that was evaluated.
        b: the same.
        output: folder for ``comparison.json`` and ``comparison.png``; nothing is written if None.
        metrics: of `COMPARABLE`. Metrics of one set alone (clip_score, image_reward, clip_iqa) are measured for both.
        device: where networks run; a GPU if there is one and None is given.
        seed: of the bootstrap.

    Returns:
        A mapping for each row of the table: ``metric``, ``of`` ("a to b", "a" or "b"), ``value``, ``unit``, ``better``,
        ``n``, ``spread``, ``interval``, and what else the metric needs. Where the pictures do not give it, ``value`` is
        None and ``why`` says why.

    Raises:
        NotADirectoryError: ``a`` or ``b`` is no folder, or ``output`` is none.
        ImportError: a library that a metric needs is missing.
        ValueError: an unknown metric, no pictures, no common names, pairs of two sizes or, by ``metadata.jsonl``, of
            two prompts, or no prompts for a metric that needs them.
    """
    if unknown := [metric for metric in metrics if metric not in COMPARABLE]:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(COMPARABLE)}.")
    if not metrics:
        raise ValueError(f"no metrics to measure; name some of: {', '.join(COMPARABLE)}.")
    device = checked_device(device)
    if output:
        output_folder(output)
    check_libraries(metrics)
    first, second = PictureFolder.open(a), PictureFolder.open(b)
    names = matched(first, second)
    files, references = [first.files[name] for name in names], [second.files[name] for name in names]
    prompts = {**second.prompts, **first.prompts}
    if needing := [metric for metric in metrics if metric in PROMPTED and not prompts.keys() >= set(names)]:
        raise ValueError(
            f"{', '.join(needing)} needs the prompt of each picture, in {a}/metadata.jsonl: "
            '{"file_name": "1.png", "prompt": "red heart"}.'
        )
    other = [name for name in names if second.prompts.get(name, prompts.get(name)) != prompts.get(name)]
    if other and (by_prompt := [metric for metric in metrics if metric in PAIRED or metric in PROMPTED]):
        raise ValueError(
            f"{len(other)} of {len(names)} pictures have another prompt in {b} than in {a}, such as {other[0]}: "
            f"{prompts[other[0]]!r:.80} and {second.prompts[other[0]]!r:.80}. Make both of the same prompts, or leave "
            f"out {', '.join(by_prompt)}."
        )
    left_out = {"a": len(first.files) - len(names), "b": len(second.files) - len(names)}
    if any(left_out.values()):
        print(f"left out, without a partner: {left_out['a']} of {a}, {left_out['b']} of {b}", file=sys.stderr)
    rows = []
    for metric in each(metrics, "compare", "metric"):
        how: dict[str, Any] = {"device": device, "seed": seed}
        if metric in PAIRED or metric in DISTANCES:
            rows.append(_row(metric, "a to b", files, {"references": references, **how}))
        else:
            how["prompts"] = [prompts.get(name, "") for name in names]
            rows += [_row(metric, of, pictures, how) for of, pictures in (("a", files), ("b", references))]
    if output:
        labels = {"a": a.resolve().name, "b": b.resolve().name}
        _write(output, rows, {**labels, "without_partner": left_out, "seed": seed})
        shown = names[:_SHOWN]
        sides = {
            f"A: {labels['a']}": [read_rgb(first.files[name]) for name in shown],
            f"B: {labels['b']}": [read_rgb(second.files[name]) for name in shown],
        }
        comparison_sheet(sides, [prompts.get(name, name) for name in shown]).save(output / "comparison.png")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `compare` as text: metric, value, 95% interval, n; below it why a metric could not be measured."""
    cells = [("metric", "of", "value", "95% interval", "n")]
    for row in rows:
        arrow = {"lower": "↓", "higher": "↑"}[row["better"]]
        unit = "" if row["unit"] == "1" else f" {row['unit']}"
        interval = "–" if row["interval"] is None else "{:.4g} to {:.4g}".format(*row["interval"])
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}{unit}"
        equal = f" ({row['equal']} more are equal)" if row.get("equal") else ""
        cells.append((f"{row['metric']} {arrow}", row["of"], value, interval, f"{row['n']}{equal}"))
    reasons = [f"{row['metric']}: not measured: {row['why']}" for row in rows if row["value"] is None]
    return "\n".join([columns(cells), *reasons])


def _row(metric: str, of: str, files: Sequence[Path], how: Mapping[str, Any]) -> dict[str, Any]:
    about = METRICS[metric if metric in METRICS else f"{metric}_teacher"]
    row = {"metric": metric, "of": of, "value": None, "unit": about.unit, "better": about.better, "n": 0}
    try:
        found = measure(metric, files, **how)
    except NotMeasurableError as reason:
        return {**row, "spread": None, "interval": None, "why": str(reason)}
    return {
        **row,
        "value": found.value,
        "n": found.n,
        "spread": found.spread,
        "interval": found.interval,
        **found.extra,
    }


def _write(output: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    made = {"command": command_line(), "versions": versions(), "machine": machine(), "date": now()}
    text = json.dumps({**about, "metrics": list(rows), **made}, indent=1, ensure_ascii=False, allow_nan=False)
    with whole(output / "comparison.json") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
