"""The page of the method benchmark, docs/benchmark.md with its plots, from benchmarks/results/method/.

python -m benchmarks.method.report            # rewrite
python -m benchmarks.method.report --check    # exit 1 if the page is not what the results say
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.method.judge import draw_widths, judge
from benchmarks.method.rows import BLOCKS, FAMILIES, OURS, TITLES, Results, Row, by_family, interval_of
from benchmarks.method.runs import PICTURES, TRACKS
from benchmarks.method.widths import draw_curve

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmark.md"


def page(results: Results) -> str:
    """The whole page, Markdown."""
    parts = [_HEAD.format(pictures=PICTURES)]
    for track, steps in _tracks(results):
        title = _TRACK_TITLES.get(track, track)
        parts.append(f"## {title}, {steps} steps\n")
        rows = [row for row in results.of(track=track) if row["steps"] in (0, steps)]
        chosen = results.named(track, steps)
        parts.append("Held-out distillation loss ×1e-3 (test split):\n")
        parts.append(table(chosen, "test", 1e3, "{:.2f}"))
        if any("fd" in row for row in chosen.rows):
            parts.append("\nFréchet distance to the teacher's pictures:\n")
            parts.append(table(chosen, "fd", 1, "{:.3f}"))
        parts.append(paired(chosen))
        if (track, steps) == ("w4a8", 400):
            parts.append(storage(chosen))
        parts.append(changes(chosen))
        parts.append(forms(Results(rows)))
    parts.append(budgets(results))
    parts.append(layers(results))
    parts.append(judge(results))
    sheets = ", ".join(f"[{title}](images/sheet-{family}.png)" for family, title in FAMILIES.items())
    parts.append(_PLOTS.format(sheets=sheets))
    return "\n".join(parts).rstrip() + "\n"


_HEAD = """# The method benchmark

Written by `python -m benchmarks.method.report` from `benchmarks/results/method/*.json`, where every row has its
command, versions, machine, seed and date. The rows are made by `python -m benchmarks.method`. What is called "soft
staircase" here was the default until 30 November 2026, and is `fbqat` in the commands of rows until then. It and the
forms that were tried on it were measured by fbqat_hub 0.1 and left the code: this version cannot remake these rows.
What was `lsq-gptq` in the commands of the judge's rows is the default now.

Each family is the tiny teacher that ships. Every trained method has the same number of steps of 8 samples. A method's
learning rate is the one with the least loss on the *validation* split at the first seed; so are, where both were run,
what it trains, all quantized layers or those of the blocks, and on PixArt-Sigma the weights of its loss, none or
those of `loss_weighting: sampler`. The numbers are of the *test* split and never weighted: mean ± standard deviation
over seeds, and in parentheses "blocks" and "weighted" where they are, and the learning rate, with ↑ or ↓ where no
higher or lower one was tried (↕: no other), so that it may not be the method's best. The Fréchet distance is on the
small extractor that ships, not on Inception; it and PSNR are over {pictures} pictures from equal seeds.
"""
_TRACK_TITLES = {
    "w4a8": "W4A8, dynamic activations, annealed learning rate",
    "groups": "W4A8, dynamic activations, annealed learning rate, one scale per group of 32",
    "constant": "W4A8, dynamic activations, constant learning rate",
    "static": "W4A8, static activations (one range per layer), annealed learning rate",
    "w3a8": "W3A8, dynamic activations, annealed learning rate",
    "all-emoji": "W4A8, dynamic activations, annealed learning rate, trained on four times the pictures",
    "outliers": "W4A8, dynamic activations, annealed learning rate, a teacher with outlier channels",
}
_PLOTS = """
## Plots

![loss of each method](images/benchmark-methods.png)

![loss against learning rate](images/benchmark-rates.png)

## Pictures

Teacher, PTQ (MSE clip), PTQ with GPTQ codes and this project's default, from the same prompts and seeds, by
`python -m benchmarks.sheets`: {sheets}.
"""


def _tracks(results: Results) -> list[tuple[str, int]]:
    order = list(_TRACK_TITLES)
    found = {(row["track"], row["steps"]) for row in results.rows if row["steps"] and row["track"] in order}
    return sorted(found, key=lambda pair: (order.index(pair[0]), pair[1]))


def table(results: Results, metric: str, factor: float, form: str) -> str:
    """One row per method, one column per family; the best of each column in bold."""
    cells: dict[str, dict[str, str]] = {TITLES[method]: {} for method in TITLES}
    for family in FAMILIES:
        means = {}
        for method in TITLES:
            rows = [row for row in results.at_best(family=family, method=method) if metric in row]
            values = [factor * row[metric] for row in rows]
            if values:
                means[method] = statistics.fmean(values)
                spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
                setting = _setting(results.of(family=family, method=method), rows[0])
                cells[TITLES[method]][family] = f"{form.format(means[method])}{spread}{setting}"
        if means:
            best = TITLES[min(means, key=means.__getitem__)]
            cells[best][family] = f"**{cells[best][family]}**"
    return by_family("method", cells)


def _setting(rows: list[Row], chosen: Row) -> str:
    """What is trained and the learning rate, with an arrow to where no other one was tried; nothing of PTQ."""
    best = chosen["rate"]
    if not best:
        return ""
    tried = {row["rate"] for row in rows if (row["track"], row["seed"]) == (chosen["track"], chosen["seed"])}
    arrow = {(True, True): "↕", (True, False): "↓", (False, True): "↑", (False, False): ""}
    blocks = "blocks, " if chosen["track"].startswith(BLOCKS) else ""
    weighted = "weighted, " if chosen["track"].endswith("-weighted") else ""
    return f" ({blocks}{weighted}{best:.0e}{arrow[best == min(tried), best == max(tried)]})"


@dataclass(frozen=True)
class Comparison:
    """Ours against a baseline, both at their best settings, at the seeds that both have.

    Attributes:
        metric: a row's field.
        bits: that the baseline stores a weight, where it is known.
        changes: one a seed, in % (in dB for "psnr").
    """

    metric: str
    family: str
    method: str
    bits: float | None
    changes: Sequence[float]

    def interval(self) -> str:
        """Mean and 95% interval with the unit."""
        return interval_of(self.changes, self._digits, " dB" if self.metric == "psnr" else "%")

    def each(self) -> str:
        """The changes, seed by seed."""
        return ", ".join(f"{change:+.{self._digits}f}" for change in self.changes)

    @property
    def _digits(self) -> int:
        return 2 if self.metric == "psnr" else 1


_COMPARED = {"test": "distillation loss", "fd": "Fréchet distance", "psnr": "PSNR"}


def comparisons(results: Results) -> Iterator[Comparison]:
    """By metric and family: ours against the strongest baseline and, where that stores more bits, the strongest
    that does not."""
    for metric in _COMPARED:
        for family in FAMILIES:
            values = {
                method: {
                    row["seed"]: row[metric] for row in results.at_best(family=family, method=method) if metric in row
                }
                for method in results.distinct("method", family=family)
            }
            ours, bits = values.pop(OURS, {}), stored_bits(results, family)
            values.pop("fbqat", None)  # ours too
            means = {
                method: (-1 if metric == "psnr" else 1) * statistics.fmean(found.values())
                for method, found in values.items()
                if set(found) & set(ours)
            }
            as_small = [method for method in means if bits.get(method, 0) <= bits.get(OURS, 0) + 0.1]
            strongest = [min(group, key=means.__getitem__) for group in (means, as_small) if group]
            for method in dict.fromkeys(strongest):
                pairs = [(ours[seed], values[method][seed]) for seed in sorted(set(ours) & set(values[method]))]
                changes = [a - b if metric == "psnr" else 100 * (a / b - 1) for a, b in pairs]
                yield Comparison(metric, family, method, bits.get(method), changes)


def paired(results: Results) -> str:
    """``comparisons``, a line each, with the change seed by seed."""
    rows = []
    for found in comparisons(results):
        stored = f" ({found.bits:.1f} bits)" if found.bits else ""
        rows.append(
            (
                _COMPARED[found.metric],
                FAMILIES[found.family],
                f"{TITLES[found.method]}{stored}",
                found.interval(),
                found.each(),
            )
        )
    if not rows:
        return ""
    head = ("metric", "family", "strongest baseline", "ours, change (95% interval)", "seed by seed")
    return (
        "\nThe default then (the soft staircase) against the strongest baseline, each at its own best setting; where "
        f"that one stores more bits per weight, also against the strongest that does not:\n\n{markdown(head, rows)}\n"
    )


def stored_bits(results: Results, family: str) -> dict[str, float]:
    """Method -> bits per weight as stored, of those that have it in a row."""
    return {row["method"]: row["bits_per_weight"] for row in results.of(family=family) if "bits_per_weight" in row}


def storage(results: Results) -> str:
    """Bits per weight as stored, scales and low-rank branches included."""
    bits = {family: stored_bits(results, family) for family in FAMILIES}
    cells = {
        title: {family: f"{found[method]:.2f}" for family, found in bits.items() if method in found}
        for method, title in TITLES.items()
    }
    if not any(cells.values()):
        return ""
    return f"\nStored bits per weight, scales and low-rank branches included:\n\n{by_family('method', cells)}"


def changes(results: Results) -> str:
    """What training did to weights and codes."""
    cells: dict[str, dict[str, str]] = {TITLES[method]: {} for method in TITLES}
    for family in FAMILIES:
        for method in TITLES:
            rows = [row for row in results.at_best(family=family, method=method) if "moved" in row]
            if rows:
                moved, changed, flips = (
                    statistics.fmean(row[name] for row in rows) for name in ("moved", "codes_changed", "flips")
                )
                cells[TITLES[method]][family] = f"{moved:.3f} / {changed:.1%} / {flips:.2%}"
    if not any(cells.values()):
        return ""
    return (
        "\nWhat training did: mean distance of a weight from its start in steps of the final grid / codes that are not "
        f"those of the start / codes that change in one of the last 20 steps:\n\n{by_family('method', cells)}"
    )


def forms(results: Results) -> str:
    """Forms that were tried: their test loss against ours, seed by seed, in % (above 0: worse than it)."""
    names = sorted(name for name in results.distinct("method") if name not in TITLES)
    if not names:
        return ""
    cells: dict[str, dict[str, str]] = {name: {} for name in ["lsq-qat", *names]}
    for name, row in cells.items():
        for family in FAMILIES:
            ours = {row["seed"]: row["test"] for row in results.at_best(family=family, method=OURS)}
            tried = {row["seed"]: row["test"] for row in results.at_best(family=family, method=name)}
            differences = [100 * (tried[seed] / ours[seed] - 1) for seed in sorted(set(ours) & set(tried))]
            if differences:
                row[family] = f"{statistics.fmean(differences):+.1f} ({len(differences)})"
    return (
        "\nForms that were tried, all layers trained: test loss against that of this project's form at the same seeds, "
        f"in % (above 0 is worse), and the number of seeds:\n\n{by_family('form', cells)}"
    )


def budgets(results: Results) -> str:
    """The test loss against the number of steps, of the methods and families that have more than one budget."""
    cells: dict[str, dict[str, str]] = {TITLES[method]: {} for method in TITLES}
    columns = {}
    for family, title in FAMILIES.items():
        for steps in sorted(results.distinct("steps", family=family)):
            chosen = results.named(steps=steps)
            for method in TITLES:
                rows = chosen.at_best(family=family, method=method)
                others = results.distinct("steps", family=family, method=method)
                if rows and rows[0]["steps"] and len(others) > 1:
                    mean = statistics.fmean(1e3 * row["test"] for row in rows)
                    column = f"{family} {steps}"
                    columns[column] = f"{title}, {steps} steps"
                    setting = _setting(chosen.of(family=family, method=method), rows[0])
                    cells[TITLES[method]][column] = f"{mean:.2f}{setting} [{len(rows)}]"
    if not columns:
        return ""
    return (
        "## Longer budgets\n\nW4A8, dynamic activations, annealed: test loss ×1e-3, the best setting of those "
        "that were run at this budget, and [the number of seeds].\n\n"
        f"{by_family('method', cells, columns)}"
    )


def layers(results: Results) -> str:
    """What training only one group of layers does to the loss, in %, at the same rate and seeds (above 0: worse)."""
    cells: dict[str, dict[str, str]] = {}
    for track in [name for name in TRACKS if name.startswith("train-") and not name.endswith(("-groups", "-weighted"))]:
        for method in (OURS, "lsq-qat"):
            title = f"{track.removeprefix('train-').replace('_', '-')}, {TITLES[method]}"
            for family in FAMILIES:
                rows = results.of(family=family, track=track, method=method)
                all_trained = {
                    (row["rate"], row["seed"], row["steps"]): row["test"]
                    for row in results.of(family=family, track="w4a8", method=method)
                }
                pairs = [
                    (row["test"], all_trained[key])
                    for row in rows
                    if (key := (row["rate"], row["seed"], row["steps"])) in all_trained
                ]
                if pairs:
                    each = ", ".join(f"{100 * (some / everything - 1):+.1f}" for some, everything in pairs)
                    cells.setdefault(title, {})[family] = each
    if not cells:
        return ""
    return (
        "## Which layers are trained\n\nW4A8, 400 steps: test loss against training all layers, in %, a number for "
        "each rate and seed that both were run at (above 0 is worse). What is not trained is quantized all the same."
        "\n\n"
        f"{by_family('trained', cells)}"
    )


def plots(results: Results, folder: Path) -> None:
    """Write benchmark-methods.png and benchmark-rates.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    main = results.named()
    families = [family for family in FAMILIES if main.of(family=family)]
    figure, axes = pyplot.subplots(
        1, len(families), figsize=(4 * len(families), 4), squeeze=False, layout="constrained"
    )
    methods = [name for name in TITLES if main.of(method=name)]
    for axis, family in zip(axes[0], families, strict=True):
        for height, method in enumerate(methods):
            values = [1e3 * row["test"] for row in main.at_best(family=family, method=method)]
            if not values:
                axis.text(0, height, " not run", va="center", fontsize=8, color="tab:grey")
                continue
            colour = "tab:red" if method == OURS else "tab:grey"
            axis.barh(height, statistics.fmean(values), color=colour, alpha=0.6)
            axis.plot(values, [height] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(methods)), methods if family == families[0] else [""] * len(methods))
        axis.invert_yaxis()
        axis.set_title(FAMILIES[family])
        axis.set_xlabel("held-out loss ×1e-3")
    figure.savefig(folder / "benchmark-methods.png", dpi=110)
    pyplot.close(figure)

    figure, axes = pyplot.subplots(
        1, len(families), figsize=(4 * len(families), 3.6), squeeze=False, layout="constrained"
    )
    for axis, family in zip(axes[0], families, strict=True):
        for method in [name for name in TITLES if any(row["rate"] for row in main.of(family=family, method=name))]:
            track = main.at_best(family=family, method=method)[0]["track"]
            first = sorted(
                (row["rate"], 1e3 * row["validation"])
                for row in main.of(family=family, method=method, seed=1, track=track)
            )
            axis.plot(*zip(*first, strict=True), marker="o", markersize=3, label=method, lw=2 if method == OURS else 1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        rates = sorted({row["rate"] for row in main.of(family=family) if row["rate"]})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set_title(FAMILIES[family])
        axis.set_xlabel("learning rate")
    axes[0][0].set_ylabel("validation loss ×1e-3")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(folder / "benchmark-rates.png", dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    results = Results.load()
    text = page(results)
    stale = not PAGE.exists() or PAGE.read_text() != text
    if stale and not check:
        PAGE.write_text(text)
    if not check:
        plots(results, ROOT / "docs" / "images")
        draw_curve(results, ROOT / "docs" / "images" / "size-loss.png")
        draw_widths(results, ROOT / "docs" / "images" / "widths.png")
    print(f"{PAGE.name}: {'stale' if stale and check else 'as the results say'}")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
