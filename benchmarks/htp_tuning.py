"""The tiny denoisers at W4A8 on the HTP's emulator, as calibrated and as trained with its arithmetic (`--tune`).

python -m benchmarks.htp_tuning --work runs/htp-tuning      # -> results/htp.json and a sheet; go on: same command
python -m benchmarks.htp_tuning --work runs/htp-tuning --recipes sana-tiny --seeds 1234 1 2

Denoisers alone, without decoder, text encoders and the comparison of single ops; pictures are the pipeline's with the
emulator in its denoiser's place. A recipe and seed that is done is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image

from benchmarks.htp_bundles import RECIPES
from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.bundle.pipeline import EQUAL_DB, generate, picture_psnr
from fbqat_hub.export.htp import compiler
from fbqat_hub.export.htp.export import quantize_transformer
from fbqat_hub.export.htp.graph import compile_binary
from fbqat_hub.export.htp.targets import target_for
from fbqat_hub.export.onnx.fake_quantized import FakeQuantizedGraph
from fbqat_hub.export.onnx.float_graph import as_feed, packed_layers
from fbqat_hub.export.onnx.parity import compare
from fbqat_hub.export.onnx.precision import PRESETS
from fbqat_hub.export.onnx.reference import exact_session, run_all
from fbqat_hub.export.onnx.tuning import Tuning, computed, tune_graph
from fbqat_hub.export.progress import Progress
from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.calibration import export_data, teacher_draws
from fbqat_hub.training.distill import train
from fbqat_hub.training.lora_merge import float_pipeline
from fbqat_hub.training.recipe import Recipe, load_recipe

RESULTS = Path(__file__).parent / "results"
METHOD, SOC, STEPS, PICTURES = "ptq-gptq", "sm8750", 100, 1
SHEET = Path(__file__).parents[1] / "docs" / "images" / "htp-tuning.png"
LABELS = {
    "teacher": "float teacher",
    "packed": "packed, in torch",
    "before": "emulator, as calibrated",
    "after": "emulator, tuned",
}

Pictures = Sequence[np.ndarray]


def measured(recipe: Recipe, folder: Path, steps: int) -> dict[str, Any]:
    """Everything that is compared, before and after `steps` of tuning; pictures are left in `folder`."""
    run = train(recipe, folder / "packed", resume=True)
    pipeline = load_pipeline(run, torch.float32)
    transformer, family = pipeline.transformer, FAMILIES[recipe.family]
    data = export_data(recipe, pipeline.scheduler)
    bar = Progress(20, shown=True)
    wrapper = family.graph(transformer, data.calibration[0])
    quantized = quantize_transformer(
        transformer, family, wrapper, data.calibration, data.held_out, folder, PRESETS["w4a8"], bar
    )
    (graph,) = quantized.graphs
    draw, teacher = teacher_draws(recipe, pipeline.scheduler)
    tuning = Tuning(steps=steps, seed=recipe.seed, draw=draw, teacher=teacher)
    packed = [each["sample"] for each in graph.expected]
    expected = [tuning.predicted(item).numpy() for item in data.held_out]
    prompts = data.prompts[:PICTURES]
    drawn = {
        "teacher": _drawn(float_pipeline(recipe), prompts, recipe),
        "packed": _drawn(pipeline, prompts, recipe),
    }
    untuned = onnx.load(graph.path)
    tuned = tune_graph(
        untuned,
        layers=packed_layers(transformer),
        tuning=tuning,
        wrapper=wrapper,
        held_out=data.held_out,
        packed=packed,
    )
    found: dict[str, Any] = {"inputs": len(packed), "tuning": tuned.report}
    as_calibrated = computed(FakeQuantizedGraph(untuned), wrapper, data.held_out)
    sides = {"before": (untuned, as_calibrated), "after": (tuned.model, tuned.outputs["torch_tuned"])}
    for name, (model, in_torch) in sides.items():
        with _emulator(model, graph.stored_bits) as emulator:
            emulated = [emulator.run(feed)[0] for feed in quantized.held_out]
            drawn[name] = _drawn(
                pipeline,
                prompts,
                recipe,
                lambda item, run=emulator.run: torch.from_numpy(run(as_feed(wrapper.host_inputs(item)))[0]),
            )
        found[name] = {
            "torch_vs_cpu_reference": {"sqnr_db": _sqnr(run_all(exact_session(model), quantized.held_out), in_torch)},
            "emulator_vs_torch": compare(in_torch, emulated),
            "emulator_vs_torch_packed": compare(packed, emulated),
            "emulator_vs_teacher": compare(expected, emulated),
        }
    pairs = [(name, "teacher") for name in ("packed", "before", "after")] + [("before", "packed"), ("after", "packed")]
    found["pictures_psnr_db"] = {f"{name}_vs_{other}": _psnr(drawn[other], drawn[name]) for name, other in pairs}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    for name, pictures in drawn.items():
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{number}-{name}.png")
    return found


@contextlib.contextmanager
def _emulator(model: onnx.ModelProto, stored_bits: Mapping[str, int]) -> Iterator[compiler.Worker]:
    """The emulator with `model`, a QDQ graph, compiled and audited."""
    target = target_for(SOC)
    with tempfile.TemporaryDirectory() as folder:
        graph, context = Path(folder) / "graph.qdq.onnx", Path(folder) / "graph.onnx"
        onnx.save(model, graph)
        compile_binary(graph, context, target, Path(folder) / "scratch", stored_bits)
        with compiler.emulator(context, target) as emulator:
            yield emulator


def _drawn(pipeline: Any, prompts: Sequence[str], recipe: Recipe, denoise: Any = None) -> Pictures:
    return [generate(pipeline, prompt, recipe.generation, seed, denoise).picture for seed, prompt in enumerate(prompts)]


def _sqnr(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """In dB, at most `EQUAL_DB`: JSON has no infinity."""
    return min(round(sqnr_db(reference, other), 3), EQUAL_DB)


def _psnr(references: Pictures, pictures: Pictures) -> float:
    """The mean PSNR in dB."""
    return float(np.mean([picture_psnr(*pair) for pair in zip(references, pictures, strict=True)]))


def sheet(folders: Mapping[str, Path]) -> Image.Image:
    """The pictures that `measured` left in folders, by the family's title; a prompt a row."""
    columns: dict[str, list[Image.Image]] = {label: [] for label in LABELS.values()}
    prompts = []
    for title, folder in folders.items():
        prompts += [f"{title}: {prompt}" for prompt in json.loads((folder / "prompts.json").read_text())]
        for name, label in LABELS.items():
            columns[label] += [Image.open(folder / f"{number}-{name}.png") for number in range(PICTURES)]
    return comparison_sheet(columns, prompts, tile=128)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the packed models and what is made of them")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234], help="of the recipes (default: 1234)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of tuning (default: {STEPS})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.recipes:
        for seed in options.seeds:
            recipe = load_recipe(name, method=METHOD, steps=0, seed=seed)
            folder = options.work / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            done = folder / f"measured-{options.steps}.json"
            print(f"== {name}, seed {seed}", flush=True)
            if not done.exists():
                found = measured(recipe, folder, options.steps)
                done.write_text(json.dumps(found, indent=1))
            found = json.loads(done.read_text())
            record = Record(
                suite="htp",
                family=recipe.family,
                method=METHOD,
                metric="sqnr_db",
                value=found["after"]["emulator_vs_teacher"]["sqnr_db"],
                n=found["inputs"],
                seed=seed,
                extra={"tuned_steps": options.steps, **found},
            )
            write_records(RESULTS / "htp.json", [record])
    if options.recipes != RECIPES:
        return  # the sheet has all of them
    shown = {name: options.work / f"{name}-{options.seeds[0]}" for name in options.recipes}
    sheet({FAMILIES[load_recipe(name).family].title: folder for name, folder in shown.items()}).save(SHEET)


if __name__ == "__main__":
    main()
