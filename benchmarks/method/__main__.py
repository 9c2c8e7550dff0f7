"""The method benchmark: methods x families x learning rates x seeds, at equal budget.

    python -m benchmarks.method                                     # all methods, all families, W4A8, three seeds
    python -m benchmarks.method --families sana --tracks w3a8 static --methods lsq-qat fbqat
    python -m benchmarks.method --tracks w4a8 --steps 2000 --methods vqat lsq-qat fbqat
    python -m benchmarks.method --short                             # minutes: the harness, not the science

Each method's learning rate is the one with the least loss on the *validation* split at the first seed. The grid is
the same for all methods; where the best rate lies at its end, the grid goes on by a factor of 2, so that every rate is
bracketed. The other seeds run at that rate only. What is reported is the *test* split. A run that is in the results
already is not repeated, so an interrupted benchmark goes on; one without pictures, or with fewer than are asked for
now, is. Method torchao-qat needs the extra `benchmark`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.method.runs import (
    FLOORS,
    METHODS,
    PICTURES,
    RECIPES,
    TORCHAO_NEEDED,
    TRACKS,
    VARIANTS,
    Bench,
    Setting,
    method_of,
)
from fbqat_hub.files import whole

RESULTS = Path(__file__).parents[1] / "results" / "method"
RATES = (5e-5, 1e-4)
# The grid is not continued beyond these.
LOWEST_RATE, HIGHEST_RATE = 2.5e-5, 8e-4
_KEY = ("family", "track", "method", "steps", "rate", "seed")

# A setting, and whether its pictures are wanted -> its row.
Run = Callable[[Setting, bool], dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.method", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=["w4a8"])
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *VARIANTS, *FLOORS], default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="the grid of learning rates")
    parser.add_argument("--fixed-rates", action="store_true", help="do not continue the grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--short", action="store_true", help="2 steps, one rate, one seed, no pictures")
    parser.add_argument("--no-pictures", action="store_true", help="losses only; no Fréchet distance, no PSNR")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results, one file per family")
    options = parser.parse_args(arguments)
    if options.short:
        options.rates, options.fixed_rates, options.seeds, options.steps = [1e-4], True, [1], 2
        options.no_pictures = True
    options.methods = installed(options.methods)
    for family in options.families:
        bench = Bench(family)
        file = options.output / f"{family}.json"

        def run(setting: Setting, pictures: bool, bench: Bench = bench, file: Path = file) -> dict[str, Any]:
            for row in read(file):
                if same(row, vars(setting)) and "sampler" in row and row.get("pictures", 0) >= PICTURES * pictures:
                    return row
            row = bench.measure(setting, pictures=pictures)
            add(file, row)
            shown = {key: row[key] for key in (*_KEY, "validation", "test", "sampler", "fd", "seconds") if key in row}
            print(json.dumps(shown), flush=True)
            return row

        for track in options.tracks:
            for method in options.methods:
                run_method(run, family, track, method, options)


def installed(methods: list[str]) -> list[str]:
    """The methods without torchao's where torchao is missing, which stderr is told.

    Raises:
        SystemExit: no other method is left.
    """
    if "torchao-qat" not in methods or find_spec("torchao"):
        return methods
    others = [method for method in methods if method != "torchao-qat"]
    if not others:
        raise SystemExit(TORCHAO_NEEDED)
    print(f"Left out: {TORCHAO_NEEDED}", file=sys.stderr)
    return others


def run_method(run: Run, family: str, track: str, method: str, options: argparse.Namespace) -> None:
    """All rates at the first seed, then the best rate at every seed, with pictures if they are wanted."""
    pictures = not options.no_pictures
    base = {"family": family, "track": track, "method": method}
    if not method_of(method).trained:
        run(Setting(**base, steps=0, rate=0.0, seed=options.seeds[0]), pictures)
        return
    base["steps"] = options.steps
    best = options.rates[0]
    if len(options.rates) > 1 or not options.fixed_rates:
        losses: dict[float, float] = {}
        queue = sorted(options.rates)
        while queue:
            rate = queue.pop(0)
            losses[rate] = run(Setting(**base, rate=rate, seed=options.seeds[0]), False)["validation"]
            if not queue and not options.fixed_rates:
                queue = continuation(losses)
        best = min(losses, key=losses.__getitem__)
    for seed in options.seeds:
        run(Setting(**base, rate=best, seed=seed), pictures)


def continuation(losses: dict[float, float]) -> list[float]:
    """The next rate beyond the end of the grid where the best one lies, if any.

    >>> continuation({1e-4: 2.0, 2e-4: 3.0}), continuation({5e-5: 2.5, 1e-4: 2.0, 2e-4: 3.0})
    ([5e-05], [])
    """
    best = min(losses, key=losses.__getitem__)
    if best == min(losses) and best / 2 >= LOWEST_RATE:
        return [best / 2]
    if best == max(losses) and best * 2 <= HIGHEST_RATE:
        return [best * 2]
    return []


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if it is not there."""
    return json.loads(path.read_text()) if path.exists() else []


def same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows, or a row and a setting, are of the same run."""
    return all(row[name] == other[name] for name in _KEY)


def add(path: Path, row: dict[str, Any]) -> None:
    """Add a row in place of an older one of the same run.

    The file is written beside and renamed. One process writes a file at a time.
    """
    others = [other for other in read(path) if not same(other, row)]
    with whole(path) as partial:
        partial.write_text(json.dumps([*others, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
