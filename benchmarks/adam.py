"""Training with Adam's moments in 32 bits and in 8: the same student, batches and rates, and the loss that is left.

    python -m benchmarks.adam                                  # -> benchmarks/results/adam.json; needs torchao
    python -m benchmarks.adam --families sana --seeds 1        # some of the rows; the others stay

The recipes of the tiny teachers that ship, with fewer steps and 4 bits throughout. The loss is that of the test split,
never trained on. The bytes are those of the optimizer's own tensors after training. On a CPU torchao's step runs
uncompiled.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.method.runs import RECIPES, Remembered
from fbqat_hub.evaluation.results import machine, now, versions
from fbqat_hub.families import get_family
from fbqat_hub.files import whole
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.adam import optimizer_bytes, plain_tensors
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.loop import Loop, accelerator_of
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.student import prepare_student
from fbqat_hub.training.teachers import resolve_teacher

RESULTS = Path(__file__).parent / "results" / "adam.json"
FAMILIES, SEEDS, STEPS, REPEATS = ("sana", "flux"), (1, 2, 3), 200, 2


def measure(family: str, seed: int) -> list[dict[str, Any]]:
    """A row each of 32 and 8 bits, from one student."""
    recipe = _recipe(family, seed, 32)
    pipeline = load_pipeline(resolve_teacher(recipe.teacher), torch.float32)
    splits, teacher = cached_splits(recipe, pipeline), pipeline.transformer.eval().requires_grad_(False)
    draws = Remembered(teacher, get_family(family), pipeline.scheduler, recipe.generation, seed)
    torch.manual_seed(seed)
    start = prepare_student(recipe, teacher, splits["train"], draws)
    before = statistics.fmean(held_out_loss(start.eval(), teacher, splits["test"], draws, repeats=REPEATS))
    rows = []
    for bits in (32, 8):
        of_bits, student = _recipe(family, seed, bits), copy.deepcopy(start)
        with tempfile.TemporaryDirectory() as folder:
            loop = Loop(of_bits, student, teacher, splits, draws, Path(folder), accelerator_of(of_bits))
            loop.start(resume=False)
            for step in range(STEPS):
                loop.step(step)
            loop.finish()
        states = loop.optimizer.state.values()
        kept = [tensor for state in states for value in state.values() for tensor in plain_tensors("", value).values()]
        trained = [parameter for parameter in student.parameters() if parameter in loop.optimizer.state]
        row = {
            "name": f"{family}-{bits}-{seed}",
            "family": family,
            "seed": seed,
            "moment_bits": bits,
            "steps": STEPS,
            "batch_size": of_bits.batch_size,
            "learning_rate": of_bits.learning_rate,
            "loss": statistics.fmean(held_out_loss(student.eval(), teacher, splits["test"], draws, repeats=REPEATS)),
            "loss_before": before,
            "draws": REPEATS * len(splits["test"]),
            "trained": sum(parameter.numel() for parameter in trained),
            "optimizer_bytes": sum(tensor.nbytes for tensor in kept),
            "planned_bytes": optimizer_bytes(trained, bits),
            "command": f"python -m benchmarks.adam --families {family} --seeds {seed}",
            "machine": machine(),
            "versions": versions("torchao"),
            "date": now(),
        }
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key not in ("machine", "versions")}), flush=True)
    return rows


def _recipe(family: str, seed: int, bits: int) -> Recipe:
    """Of 4 bits throughout, so that no time goes into the choice of widths."""
    changes = {"quantization": {"average_bits": None}, "optimizer": {"moment_bits": bits}}
    return load_recipe(RECIPES[family], seed=seed, steps=STEPS, save_every=0, **changes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adam", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=RECIPES, default=FAMILIES, help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="default: %(default)s")
    options = parser.parse_args()
    for family in options.families:
        for seed in options.seeds:
            rows = measure(family, seed)
            found = {row["name"]: row for row in (json.loads(RESULTS.read_text()) if RESULTS.exists() else [])}
            found |= {row["name"]: row for row in rows}
            with whole(RESULTS) as partial:
                partial.write_text(json.dumps([found[key] for key in sorted(found)], indent=2) + "\n")


if __name__ == "__main__":
    main()
