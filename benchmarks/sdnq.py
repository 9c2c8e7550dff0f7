"""Pictures of packed pipelines drawn by SDNQ, against those drawn by this package.

    python -m benchmarks.sdnq       # -> benchmarks/results/integration.json; then python -m benchmarks.tables

Needs the package sdnq. The tiny pipelines that ship, quantized to W4A8 (PTQ, MSE clip) and exported by ``fbqat export
--to sdnq``; each recipe's own prompts, one seed each, in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import sdnq  # noqa: F401  # said to be missing before anything is made
import torch
from diffusers import DiffusionPipeline

from benchmarks.pictures import RESULTS, psnr_record
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.families import FAMILIES
from fbqat_hub.generation import generate_pictures
from fbqat_hub.integrations.sdnq import export_sdnq
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe, load_recipe

COMMAND = "python -m benchmarks.sdnq"
PART = "SDNQ, pictures against the packed pipeline's"


def measure(recipe: Recipe, work: Path) -> Record:
    """PSNR of SDNQ's pictures to ours, and how many layers it computes with int8 activations."""
    packed = convert_pipeline(recipe.teacher, work / "packed", progress=False)
    made = export_sdnq(packed, work / "sdnq")
    call = {**recipe.generation, "num_inference_steps": recipe.evaluation.inference_steps}
    seeds = range(len(recipe.prompts))
    theirs = DiffusionPipeline.from_pretrained(made.folder, dtype=torch.float32)
    pictures = [
        generate_pictures(pipeline, recipe.prompts, call, seeds).float() / 255
        for pipeline in (theirs, load_pipeline(packed, torch.float32))
    ]
    return psnr_record(
        recipe,
        *pictures,
        "sdnq",
        command=COMMAND,
        part=PART,
        precision="w4a8",
        int8_layers=len(made.int8),
        float_activation_layers=len(made.float_activations),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [family.name for family in FAMILIES.values() if family.tiny]
    parser.add_argument("--families", nargs="+", choices=trained, default=trained)
    for name in parser.parse_args().families:
        with tempfile.TemporaryDirectory() as work:
            record = measure(load_recipe(FAMILIES[name].tiny), Path(work))
        write_records(RESULTS, [record])
        print(f"{name:13s} {record.value:.1f} dB", flush=True)


if __name__ == "__main__":
    main()
