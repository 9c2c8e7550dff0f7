"""What quantized text encoders do to the pictures of the tiny pipelines that ship.

    python -m benchmarks.text_encoders        # -> benchmarks/results/integration.json; then python -m benchmarks.tables

Each recipe's own prompts, from three seeds each, with the float denoiser and with a W4A8 one (PTQ, MSE clip). PSNR is
to the pictures of the float pipeline from the same seeds; with a W4A8 denoiser most of the difference is its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pictures import RESULTS, psnr_record
from fbqat_hub.components import read_index
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.families import FAMILIES
from fbqat_hub.generation import generate_pictures
from fbqat_hub.integrations.transformers import TEXT_ENCODERS, text_encoder_config
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import convert, prepare
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import resolve_teacher

DENOISERS = ("float", "w4a8")
SEEDS = 3
COMMAND = "python -m benchmarks.text_encoders"


def pictures(pipeline: Any, recipe: Recipe) -> Tensor:
    """[prompts x SEEDS, 3, H, W] in [0, 1]; the seeds of one prompt follow each other."""
    call = {**recipe.generation, "num_inference_steps": recipe.evaluation.inference_steps}
    texts = [prompt for prompt in recipe.prompts for _ in range(SEEDS)]
    return generate_pictures(pipeline, texts, call, range(len(texts))).float() / 255


def pack_denoiser(pipeline: Any, recipe: Recipe) -> None:
    """In place, as ``fbqat convert`` does."""
    overrides = FAMILIES[recipe.family].activation_overrides
    config = load_recipe(FAMILIES[recipe.family].tiny, method="ptq-mse").config()
    prepare(pipeline.transformer, config.weight_scheme(), config.activation_scheme(), overrides=overrides)
    convert(pipeline.transformer)


def measure(recipe: Recipe, denoiser: str) -> list[Record]:
    """A record for float encoders (with a packed denoiser only) and one for each precision."""
    folder = Path(resolve_teacher(recipe.teacher))
    wanted = pictures(load_pipeline(folder, torch.float32), recipe)
    records = []
    for precision in (["float"] if denoiser != "float" else []) + list(TEXT_ENCODERS):
        encoders = {}
        for name, part in read_index(folder)[1].items():
            if name.startswith("text_encoder") and precision != "float":
                config = text_encoder_config(part, precision)
                encoders[name] = part.load(torch.float32, quantization_config=config)
        pipeline = load_pipeline(folder, torch.float32, **encoders)
        if denoiser != "float":
            pack_denoiser(pipeline, recipe)
        part = f"text encoders, {denoiser} denoiser"
        made = pictures(pipeline, recipe)
        records.append(psnr_record(recipe, made, wanted, command=COMMAND, part=part, precision=precision))
        print(f"{recipe.family:13s} {denoiser:6s} {precision:6s} {records[-1].value:.2f} dB", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [family.name for family in FAMILIES.values() if family.tiny]
    parser.add_argument("--families", nargs="+", choices=trained, default=trained)
    for name in parser.parse_args().families:
        recipe = load_recipe(FAMILIES[name].tiny)
        for denoiser in DENOISERS:
            write_records(RESULTS, measure(recipe, denoiser))


if __name__ == "__main__":
    main()
