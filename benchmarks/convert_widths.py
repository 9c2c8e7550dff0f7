"""Which layers get 8 bits: chosen by prompts, or by the weights alone, in a conversion by GPTQ without training.

    python -m benchmarks.convert_widths                    # the tiny teachers -> results/convert.json, key "widths"
    python -m benchmarks.convert_widths --families sana    # one of them; the rows of the others stay

The loss is the judge's (`benchmarks.method.judge`) on a third of its captions: the squared distance to the teacher's
predictions where the teacher's sampler asks for them. The prompts are captions of the training split.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.convert_true_size import RESULTS, save
from benchmarks.method.runs import RECIPES
from fbqat_hub.components import read_index
from fbqat_hub.evaluation.results import machine, now, versions
from fbqat_hub.families import FAMILIES
from fbqat_hub.integrations.checkpoint import targets_of
from fbqat_hub.integrations.convert_files import checked_tensors
from fbqat_hub.integrations.streamed import StreamedDenoiser
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import convert, gptq_initialize
from fbqat_hub.quantization.convert import prepare_layers
from fbqat_hub.quantization.sensitivity import nearest_errors, rounding_errors, weight_sensitivity
from fbqat_hub.quantization.sensitivity_blocks import block_sensitivity
from fbqat_hub.quantization.widths import WIDTHS, widths_of_average
from fbqat_hub.training.openmoji import default_cache_dir, load_openmoji
from fbqat_hub.training.ptq import SCORED, spread
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.sampled import open_sampler, sampled_inputs
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.training.trajectories import predictions, trajectories, trajectory_loss

TRAINED = list(RECIPES)
SAMPLES, AVERAGE = 64, 4.5


def measure(name: str) -> dict[str, Any]:
    """The losses of one family's tiny teacher: all layers of 4 bits, and both ways to choose those of 8."""
    family, recipe = FAMILIES[name], load_recipe(RECIPES[name])
    folder = Path(resolve_teacher(recipe.teacher))
    data = load_openmoji(max(recipe.size))
    prompts = list(dict.fromkeys(data["train"]["caption"]))[:: len(data["train"]) // SAMPLES][:SAMPLES]
    pipeline = load_pipeline(folder, torch.float32)
    model, config = pipeline.transformer.eval().requires_grad_(False), recipe.config()
    path = default_cache_dir() / "judge" / f"{name}-widths.safetensors"
    path.unlink(missing_ok=True)  # of whatever teacher
    judge = trajectories(pipeline, family, data["test"]["caption"][::3], recipe.generation, path, pictures=1)
    wanted = predictions(model, judge, family)
    denoiser = read_index(folder)[1]["transformer"]
    streamed = StreamedDenoiser(denoiser, family.blocks, checked_tensors(denoiser))
    sampler = open_sampler(folder, streamed.model)
    inputs = sampled_inputs(sampler, family, streamed, prompts, recipe.generation, SAMPLES)
    chosen = targets_of(model, config)
    sizes = {each.names[0]: each.layer.weight.numel() for each in chosen}
    scheme = config.weight_scheme()
    by_weights = {
        each.names[0]: weight_sensitivity(each.layer.weight, rounding_errors(each.layer.weight, scheme, WIDTHS))
        for each in chosen
    }
    by_prompts = block_sensitivity(
        streamed.model, streamed.names, spread(inputs, SCORED), targets_of(streamed.model, config),
        nearest_errors(scheme, WIDTHS), family.predict, load=streamed.block,
    )  # fmt: skip
    widths: dict[str, Mapping[str, int]] = {"4 bits": {}}
    for title, scores in (("weights", by_weights), ("prompts", by_prompts)):
        widths[title] = widths_of_average(scores, sizes, AVERAGE)
    losses, of_8 = {}, {}
    for title, own in widths.items():
        student, mixed = copy.deepcopy(model), config.with_widths(own)
        prepare_layers(student, targets_of(student, mixed), scheme)
        gptq_initialize(student, lambda: inputs)
        convert(student)
        losses[title] = statistics.fmean(trajectory_loss(predictions(student, judge, family), wanted))
        of_8[title] = sum(bits == 8 for bits in own.values())
    return {
        "losses": losses,
        "layers_of_8_bits": of_8,
        "layers": len(sizes),
        "draws": len(judge),
        "samples": len(inputs),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert_widths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", nargs="+", choices=TRAINED, default=TRAINED, help="default: all with a teacher")
    for name in parser.parse_args().families:
        found = json.loads(RESULTS.read_text()).get("widths", {}) if RESULTS.exists() else {}
        row = measure(name)
        facts = {"command": "python -m benchmarks.convert_widths", "machine": machine(), "versions": versions()}
        save("widths", {**found, **facts, "date": now(), "average_bits": AVERAGE, name: row})


if __name__ == "__main__":
    main()
