"""Relative learning rates, from one width of a model to another.

    python -m benchmarks.rates --work DISK                  # -> benchmarks/results/rates.json; 90 minutes of one core
    python -m benchmarks.rates --work DISK --widths 64      # some of the rows; the others stay

Tiny PixArt-Sigmas of one depth and three widths are trained, with the autoencoder of the one that ships, and each is
quantized by the default at 4 bits throughout at rates a factor of 2 apart. The loss is that of the validation split,
never trained on. The same start, batches and noises for all rates of a width.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.markdown import markdown
from benchmarks.method.runs import Remembered
from fbqat_hub.evaluation.results import machine, now, versions
from fbqat_hub.families import get_family
from fbqat_hub.files import whole
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import FakeQuantizedLinear, named_layers
from fbqat_hub.training.adam import relative_unit
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.loop import accelerator_of, distill
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.student import prepare_student
from fbqat_hub.training.teacher import RECIPES, train_teacher
from fbqat_hub.training.teachers import resolve_teacher

RESULTS = Path(__file__).parent / "results" / "rates.json"
NAME = "pixart-sigma-tiny"
WIDTHS, RATES, STEPS, REPEATS = (64, 128, 256), (4e-4, 8e-4, 1.6e-3, 3.2e-3), 400, 4
_TEACHER_STEPS, _FROM_SMILEYS, _HEAD = 1500, 300, 32


def teacher_of(width: int, work: Path) -> Path:
    """A trained teacher of that width, in a folder of its own."""
    recipe = yaml.safe_load((RECIPES / f"{NAME}.yaml").read_text())
    recipe["transformer"] |= {"num_attention_heads": width // _HEAD, "cross_attention_dim": width}
    training = recipe["denoiser_training"]
    last = training["focus"][-1] | {"after": _FROM_SMILEYS}
    rate = training["learning_rate"] * 128 / width
    training |= {"steps": _TEACHER_STEPS, "learning_rate": rate, "focus": [*training["focus"][:-1], last]}
    folder = work / f"{NAME}-{width}"
    if not folder.exists():
        shipped = load_pipeline(resolve_teacher(load_recipe(NAME).teacher), torch.float32)
        train_teacher(recipe, folder, autoencoder=shipped.vae)
    return folder


def measure(width: int, work: Path) -> list[dict[str, Any]]:
    """A row a rate, and one of the start, rate 0."""
    recipe = load_recipe(NAME, teacher=str(teacher_of(width, work)), steps=STEPS, quantization={"average_bits": None})
    pipeline = load_pipeline(recipe.teacher, torch.float32)
    splits, teacher = cached_splits(recipe, pipeline), pipeline.transformer.eval().requires_grad_(False)
    draws = Remembered(teacher, get_family(recipe.family), pipeline.scheduler, recipe.generation, recipe.seed)
    torch.manual_seed(recipe.seed)
    start = prepare_student(recipe, teacher, splits["train"], draws)
    layers = [layer for _, layer in named_layers(start, FakeQuantizedLinear) if layer.weight.requires_grad]
    rows = []
    for rate in (0.0, *RATES):
        student = copy.deepcopy(start)
        if rate:
            _train(replace(recipe, learning_rate=rate, save_every=0), student, teacher, splits, draws)
        losses = held_out_loss(student.eval(), teacher, splits["validation"], draws, repeats=REPEATS)
        rows.append(
            {
                "name": f"{width}-{rate:g}",
                "width": width,
                "rate": rate,
                "steps": STEPS,
                "batch_size": recipe.batch_size,
                "weight_rms": statistics.fmean(layer.weight.square().mean().sqrt().item() for layer in layers),
                "layers": len(layers),
                "loss": statistics.fmean(losses),
                "draws": len(losses),
                "command": f"python -m benchmarks.rates --work DISK --widths {width}",
                "machine": machine(),
                "versions": versions(),
                "date": now(),
            }
        )
    return rows


def _train(recipe: Recipe, student: Any, teacher: Any, splits: Any, draws: Remembered) -> None:
    with tempfile.TemporaryDirectory() as folder:
        distill(recipe, student, teacher, splits, draws, Path(folder), accelerator_of(recipe), False, False)


def rates_table() -> str:
    """Widths x rates."""
    found = json.loads(RESULTS.read_text())
    columns = ("not trained", *(f"{1e3 * rate:g}e-3" for rate in RATES), "the best, as one rate for all layers")
    head = ("width", "root mean square of the weights", *columns)
    cells = []
    for width in sorted({row["width"] for row in found}):
        rows = {row["rate"]: row for row in found if row["width"] == width}
        size, best = rows[0.0]["weight_rms"], min(rows, key=lambda rate: rows[rate]["loss"])
        losses = [
            f"**{1e3 * row['loss']:.3f}**" if rate == best else f"{1e3 * row['loss']:.3f}" for rate, row in rows.items()
        ]
        absolute = best * relative_unit(torch.tensor(size), width)
        cells.append((str(width), f"{size:.3f}", *losses, f"{absolute:.1e}"))
    one, recipe = found[0], load_recipe(NAME)
    return (
        f"{markdown(head, cells)}\n\nLoss ×1e-3 on the validation split ({one['draws']} draws) by `learning_rate`; "
        f"PixArt-Sigma, 5 blocks, 4 bits, {STEPS} steps of {one['batch_size']}, seed {recipe.seed}. Remade by "
        "`python -m benchmarks.rates --work DISK`."
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the teachers; those that are there stay")
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for width in options.widths:
        rows = measure(width, options.work)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        kept = [row for row in kept if row["width"] != width] + rows
        with whole(RESULTS) as partial:
            partial.write_text(json.dumps(sorted(kept, key=lambda row: (row["width"], row["rate"])), indent=1) + "\n")
        for row in rows:
            print(json.dumps({key: row[key] for key in ("width", "rate", "weight_rms", "loss")}), flush=True)


if __name__ == "__main__":
    main()
