"""Average widths: what half a bit buys, as a table and as the plot of size against loss."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.method.rows import FAMILIES, OURS, Results, by_family
from benchmarks.method.runs import AVERAGES

UNTRAINED, STEPS = "ptq-gptq", 400
# Bits a weight on average, without scales -> track.
CURVE = {4.0: "uniform-4", **{average: f"mixed-{average:g}" for average in AVERAGES}}

Curve = Mapping[float, Mapping[int, Mapping[str, float]]]


def curve(results: Results, family: str, method: str) -> Curve:
    """Average width -> seed -> row, of the widths that were run."""
    found = {
        average: {row["seed"]: row for row in _rows(results, track, family, method)} for average, track in CURVE.items()
    }
    return {average: rows for average, rows in found.items() if rows}


def _rows(results: Results, track: str, family: str, method: str) -> list[dict[str, Any]]:
    """Of 400 steps, or without training."""
    return [row for row in results.of(track=track, family=family, method=method) if row["steps"] in (0, STEPS)]


def half_bits(results: Results) -> str:
    """What each half bit buys, trained and not, and what training does at each width: changes of the test loss."""
    cells: dict[str, dict[str, str]] = {}
    curves = {(family, method): curve(results, family, method) for family in FAMILIES for method in (OURS, UNTRAINED)}
    for method, title in ((OURS, "trained"), (UNTRAINED, "GPTQ, not trained")):
        for low, high in itertools.pairwise(CURVE):
            for family in FAMILIES:
                if changes := _per_half_bit(curves[family, method], low, high):
                    row = cells.setdefault(f"each half bit, {low:g} to {high:g} on average, {title}", {})
                    row[family] = _mean_and_range(changes)
    for average in CURVE:
        for family in FAMILIES:
            trained, untrained = (curves[family, method].get(average, {}) for method in (OURS, UNTRAINED))
            if both := sorted(set(trained) & set(untrained)):
                row = cells.setdefault(f"training, at {average:g} on average", {})
                row[family] = _mean_and_range(
                    [100 * (trained[seed]["test"] / untrained[seed]["test"] - 1) for seed in both]
                )
    for method, title in ((OURS, "trained"), (UNTRAINED, "GPTQ, not trained")):
        for family in FAMILIES:
            if (found := knee(curves[family, method])) is not None:
                cells.setdefault(f"knee, on validation, {title}", {})[family] = f"{found:g} on average"
    return by_family("change of the test loss (range; seeds)", cells)


def knee(points: Curve) -> float | None:
    """The average width whose validation loss lies furthest below the line from the first to the last width.

    Losses and stored bits are taken as shares of that line's, as in Kneedle (Satopaa et al., 2011). None for fewer
    than three widths.
    """
    if len(points) < 3:
        return None
    mean = {
        average: [statistics.fmean(row[name] for row in rows.values()) for name in ("bits_per_weight", "validation")]
        for average, rows in points.items()
    }
    (start, high), (end, low) = mean[min(mean)], mean[max(mean)]
    below = {
        average: (high - loss) / (high - low) - (bits - start) / (end - start) for average, (bits, loss) in mean.items()
    }
    return max(below, key=below.__getitem__)


def _per_half_bit(points: Curve, low: float, high: float) -> list[float]:
    """Change of the test loss for half a stored bit more, in %, one a seed that has both widths."""
    first, second = points.get(low, {}), points.get(high, {})
    changes = []
    for seed in sorted(set(first) & set(second)):
        a, b = first[seed], second[seed]
        halves = 2 * (b["bits_per_weight"] - a["bits_per_weight"])
        changes.append(100 * (math.exp(math.log(b["test"] / a["test"]) / halves) - 1))
    return changes


def _mean_and_range(values: Sequence[float]) -> str:
    spread = f"{min(values):+.0f} to {max(values):+.0f}; " if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.0f}% ({spread}{len(values)})"


def draw_curve(results: Results, path: Path) -> None:
    """Write the plot: stored bits per weight against test loss, as a share of trained 4 bits, a family a panel.

    Groups of 32 were measured over other draws: they are a share of the trained 4 bits over those.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(FAMILIES), sharey=True, squeeze=False)[0]
    for axis, (family, title) in zip(axes, FAMILIES.items(), strict=True):
        whole = statistics.fmean(row["test"] for row in curve(results, family, OURS)[4.0].values())
        for method, label, style in ((UNTRAINED, "GPTQ, not trained", "tab:grey"), (OURS, "trained", "tab:red")):
            points = curve(results, family, method).values()
            _line(axis, [list(rows.values()) for rows in points], whole, color=style, marker="o", label=label)
        one_scale = [row["test"] for row in results.named().at_best(family=family, method=OURS)]
        groups = results.named("groups").at_best(family=family, method=OURS)
        if groups and one_scale:
            own = statistics.fmean(one_scale)
            _line(axis, [groups], own, color="tab:blue", marker="s", label="4 bits, groups of 32, trained")
        axis.set_title(title, fontsize=10)
        axis.set_yscale("log")
        axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["5%", "10%", "20%", "50%", "100%", "200%"])
        axis.minorticks_off()
        axis.set_xticks(range(4, 9))
        axis.grid(visible=True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss, of trained 4 bits")
    figure.supxlabel("stored bits per weight, scales included", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    with path.open("wb") as file:
        canvas.print_png(file, metadata={"Software": None})


def _line(axis: Any, points: Sequence[Sequence[Mapping[str, float]]], whole: float, **style: Any) -> None:
    """Means and ranges over seeds."""
    shares = [[row["test"] / whole for row in rows] for rows in points]
    means = [statistics.fmean(values) for values in shares]
    down = [mean - min(values) for mean, values in zip(means, shares, strict=True)]
    up = [max(values) - mean for mean, values in zip(means, shares, strict=True)]
    bits = [statistics.fmean(row["bits_per_weight"] for row in rows) for rows in points]
    axis.errorbar(bits, means, (down, up), markersize=4, linewidth=1.4, capsize=2, **style)
