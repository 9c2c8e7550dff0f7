"""The method benchmark in its short form: methods x learning rates x seeds on the tiny Sana, at equal budget.

    python benchmarks/method.py                        # the grid behind the default recipe (about 25 minutes a core)
    python benchmarks/method.py --methods fbqat vqat --rates 2e-4 --seeds 1 2 3 --steps 1600

Each method's learning rate is the one with the least mean loss on the *validation* split; what is reported is the
loss on the *test* split at that rate. A run that is in the file already is not repeated, so an interrupted benchmark
goes on, and two processes may share a file.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tables import method_table

from fbqat_hub.evaluation.results import machine, now, versions
from fbqat_hub.families import get_family
from fbqat_hub.integrations.diffusers import load_pipeline
from fbqat_hub.quantization import set_bit_width
from fbqat_hub.training.distill import Draws, cached_splits, distill, held_out_loss, prepare_student
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.teachers import resolve_teacher

RESULTS = Path(__file__).parent / "results" / "method-tiny-sana.json"
METHODS = ("ptq-maxabs", "ptq-mse", "vqat", "lsq-qat", "integer", "fbqat-paper", "fbqat")
RATES = (1e-4, 2e-4, 4e-4, 8e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="sana-tiny")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates of the trained methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="of the learning rate")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change a recipe's field")
    parser.add_argument(
        "--label", default="", help="name of a variant made with --set; kept apart from the method's own"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()
    if not options.table:
        run_grid(options)
    print(method_table(options.output))


def run_grid(options: argparse.Namespace) -> None:
    from fbqat_hub.cli import changes_of

    base = load_recipe(options.recipe)
    pipeline = load_pipeline(resolve_teacher(base.teacher))
    splits = cached_splits(base, pipeline)
    for seed in options.seeds:
        for method in options.methods:
            for rate in [0.0] if method.startswith("ptq") else options.rates:
                name = f"{method}{' ' + options.label if options.label else ''}"
                fields = {"method": method, "seed": seed, "learning_rate": rate, "steps": options.steps}
                fields["learning_rate_schedule"] = options.schedule
                key = {"method": name, "steps": options.steps, "rate": rate, "schedule": options.schedule, "seed": seed}
                if any(all(row[k] == v for k, v in key.items()) for row in read(options.output)):
                    continue
                recipe = load_recipe(options.recipe, **{**fields, "save_every": 0, **changes_of(options.set)})
                draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.seed)
                began = time.monotonic()
                torch.manual_seed(seed)
                student = prepare_student(recipe, pipeline.transformer, splits["train"], draws)
                with tempfile.TemporaryDirectory() as folder:
                    if recipe.steps:
                        teacher = pipeline.transformer
                        distill(recipe, student, teacher, splits, draws, Path(folder), Accelerator(), False, True)
                set_bit_width(student, 4)
                losses = {
                    split: statistics.fmean(
                        held_out_loss(student, pipeline.transformer, splits[split], draws, repeats=4)
                    )
                    for split in ("validation", "test")
                }
                seconds = round(time.monotonic() - began, 1)
                row = {**key, **losses, "seconds": seconds, "set": options.set, "versions": versions()}
                append(options.output, {**row, "machine": machine(), "date": now()})
                print(json.dumps({**key, **losses}))


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps([*read(path), row], indent=1) + "\n")
        os.replace(partial, path)
    finally:
        os.close(folder)


if __name__ == "__main__":
    main()
