"""Time of a training step: a fake-quantized student's over a float model's, and torchao's QAT beside them.

    python -m benchmarks.training_step       # -> benchmarks/results/training-step.json; needs torchao

Two blocks of Sana-600M's shape at 512 px, random weights, one thread. A step is the model's forward, its backward and
Adam; the teacher's forward, which all have, is measured apart. The models take turns in one process, so that a change
of the machine's speed meets all; ratios are medians of those of the rounds. The layers and parameters that are trained
are the same, those of the recipe, but for the learned clips, which only the default has. torchao's weights are in
groups of 32, as its own recipe of QAT has them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.method.baselines import student_of
from benchmarks.method.torchao_qat import TORCHAO_GROUP_SIZE, torchao_linear
from benchmarks.speed_cpu import float_model, inputs
from fbqat_hub.evaluation.results import machine, now, versions
from fbqat_hub.families import get_family
from fbqat_hub.files import whole
from fbqat_hub.quantization import FakeQuantizedLinear, Rounding, named_layers, prepare, set_bit_width
from fbqat_hub.quantization.convert import matches
from fbqat_hub.training.adam import optimizer_of
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.student import set_trained_layers

RESULTS = Path(__file__).parent / "results" / "training-step.json"
BATCHES, WARM_UP = (1, 4), 2


def students(recipe: Recipe) -> dict[str, nn.Module]:
    """The float model, the default's student and torchao's, of the same numbers."""
    model, config = float_model().train().requires_grad_(False), recipe.config()
    ours = copy.deepcopy(model)
    prepare(ours, config.weight_scheme(), **config.layer_options())
    ours.requires_grad_(False)
    set_trained_layers(recipe, ours)
    set_bit_width(ours, config.weight_bits, Rounding(recipe.optimizer.ewgs))
    quantized = {name for name, _ in named_layers(ours, FakeQuantizedLinear)}
    patterns = get_family(recipe.family).layer_groups[recipe.train_layers]
    plain = copy.deepcopy(model)
    for name, layer in plain.named_modules():
        if name in quantized and matches(name, patterns):
            layer.requires_grad_(True)
    bits, group, no_data = config.weight_bits, TORCHAO_GROUP_SIZE, _NoData()
    theirs = student_of(
        recipe, model, no_data, no_data, lambda _, linear, scheme: torchao_linear(linear, bits, scheme, group)
    )
    return {"float32": plain, "fbqat": ours, "torchao": theirs}


class _NoData:
    """Of a method that is not calibrated, what knows the device."""

    device = torch.device("cpu")


def stepper(recipe: Recipe, model: nn.Module, given: dict[str, Any], target: Tensor) -> Callable[[], None]:
    """A training step."""
    optimizer = optimizer_of(recipe, model, model)

    def step() -> None:
        made = model(**given, return_dict=False)[0]
        (made - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(recipe: Recipe, batch: int, rounds: int) -> dict[str, Any]:
    """Medians of a batch size."""
    given, models = inputs(batch=batch), students(recipe)
    with torch.no_grad():
        target = models["float32"](**given, return_dict=False)[0]
    runs = {name: stepper(recipe, model, given, target) for name, model in models.items()}
    teacher = float_model()
    runs["teacher"] = torch.no_grad()(lambda: teacher(**given, return_dict=False)[0])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(WARM_UP + rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - began))
    over = {}
    for name in ("fbqat", "torchao"):
        ratios = [value / own for value, own in zip(times[name], times["float32"], strict=True)]
        found = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        over[name] = {key: round(value, 3) for key, value in found.items()}
    return {
        "batch": batch,
        "trained": sum(each.numel() for each in models["float32"].parameters() if each.requires_grad),
        "median_ms": {name: round(statistics.median(values), 1) for name, values in times.items()},
        "over_float": over,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of steps that are measured (default: 15)")
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("sana-600m", quantization={"average_bits": None})
    rows = [measure(recipe, batch, options.rounds) for batch in BATCHES]
    found = {
        "rows": rows,
        "rounds": options.rounds,
        "machine": machine(),
        "versions": versions("torchao"),
        "date": now(),
    }
    print(json.dumps(found, indent=2))
    if not options.dry_run:
        with whole(RESULTS) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
