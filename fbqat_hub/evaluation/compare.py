"""Two folders of pictures side by side: a table, a results file and a picture sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from fbqat_hub.evaluation.folders import PictureFolder, matched
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.evaluation.results import METRICS, command_line, machine, now, versions
from fbqat_hub.evaluation.suite import (
    DISTANCES,
    PAIRED,
    PROMPTED,
    SINGLE,
    Measurement,
    measure,
)
from fbqat_hub.files import whole
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
    device: str = "cpu",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure the pictures of ``a`` against those of the same names in ``b``, the reference.

    Args:
        a: a folder of pictures, or of a run that was evaluated.
        b: the same.
        output: folder for ``comparison.json`` and ``comparison.png``; nothing is written if None.
        metrics: of `COMPARABLE`. Metrics of one set alone (clip_score, image_reward, clip_iqa) are measured for both.
        device: where networks run.
        seed: of the bootstrap.

    Returns:
        A mapping for each row of the table: ``metric``, ``of`` ("a to b", "a" or "b"), ``value``, ``unit``, ``better``,
        ``n``, ``spread``, ``interval``, and what else the metric needs. ``value`` is None for psnr where all pairs are
        equal.

    Raises:
        NotADirectoryError: ``a`` or ``b`` is no folder.
        ValueError: an unknown metric, no pictures, no common names, pairs of two sizes, or no prompts for a metric
            that needs them.
    """
    if unknown := [metric for metric in metrics if metric not in COMPARABLE]:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(COMPARABLE)}.")
    first, second = PictureFolder.open(a), PictureFolder.open(b)
    names = matched(first, second)
    files, references = [first.files[name] for name in names], [second.files[name] for name in names]
    prompts = {**second.prompts, **first.prompts}
    if needing := [metric for metric in metrics if metric in PROMPTED and not prompts.keys() >= set(names)]:
        raise ValueError(
            f"{', '.join(needing)} needs the prompt of each picture, in {a}/metadata.jsonl: "
            '{"file_name": "1.png", "prompt": "red heart"}.'
        )
    rows = []
    for metric in tqdm(metrics, desc="compare", unit="metric"):
        if metric in PAIRED or metric in DISTANCES:
            found = measure(metric, files, references=references, device=device, seed=seed)
            rows.append(_row(metric, "a to b", found, len(names)))
        else:
            texts = [prompts.get(name, "") for name in names]
            for of, each in (("a", files), ("b", references)):
                found = measure(metric, each, prompts=texts, device=device, seed=seed)
                rows.append(_row(metric, of, found, len(names)))
    if output:
        labels = {"a": a.resolve().name, "b": b.resolve().name}
        left_out = {"a": len(first.files) - len(names), "b": len(second.files) - len(names)}
        _write(output, rows, {**labels, "without_partner": left_out, "seed": seed})
        shown = names[:_SHOWN]
        sides = {
            f"A: {labels['a']}": [Image.open(first.files[name]) for name in shown],
            f"B: {labels['b']}": [Image.open(second.files[name]) for name in shown],
        }
        comparison_sheet(sides, [prompts.get(name, name) for name in shown]).save(output / "comparison.png")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `compare` as text: metric, value, 95% interval, n."""
    cells = [("metric", "of", "value", "95% interval", "n")]
    for row in rows:
        arrow = {"lower": "↓", "higher": "↑"}[row["better"]]
        unit = "" if row["unit"] == "1" else f" {row['unit']}"
        interval = "–" if row["interval"] is None else "{:.4g} to {:.4g}".format(*row["interval"])
        value = "all equal" if row["value"] is None else f"{row['value']:.4g}{unit}"
        cells.append((f"{row['metric']} {arrow}", row["of"], value, interval, str(row["n"])))
    return columns(cells)


def _row(metric: str, of: str, found: Measurement | None, n: int) -> dict[str, Any]:
    """Without a measurement all ``n`` pairs are equal."""
    about = METRICS[metric if metric in METRICS else f"{metric}_teacher"]
    known = found or Measurement(math.inf, n, extra={"equal": n})
    return {
        "metric": metric,
        "of": of,
        "value": found.value if found else None,
        "unit": about.unit,
        "better": about.better,
        "n": known.n,
        "spread": known.spread,
        "interval": known.interval,
        **known.extra,
    }


def _write(output: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    made = {"command": command_line(), "versions": versions(), "machine": machine(), "date": now()}
    text = json.dumps({**about, "metrics": list(rows), **made}, indent=1, ensure_ascii=False, allow_nan=False)
    with whole(output / "comparison.json") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
