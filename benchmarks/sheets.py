"""Picture sheets of the tiny families: teacher, PTQ and this project's default, from the same prompts and seeds.

    python -m benchmarks.sheets                    # docs/images/sheet-FAMILY.png, about two minutes a family
    python -m benchmarks.sheets --families flux

The runs are kept in runs/sheets/ and continued, not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.families import FAMILIES
from fbqat_hub.pictures import as_image
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.distill import train
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.samples import generate_samples
from fbqat_hub.training.teachers import resolve_teacher

ROOT = Path(__file__).parents[1]
RECIPES = {name: family.tiny for name, family in FAMILIES.items() if family.tiny}
METHODS = {"ptq-mse": "PTQ W4A8", "ptq-gptq": "PTQ W4A8, GPTQ", "fbqat": "FB-QAT W4A8 (ours)"}


def sheet(family: str, runs: Path) -> Path:
    """Train what is not there yet and make the sheet of one family."""
    recipe = load_recipe(RECIPES[family])
    sources = {"teacher": Path(resolve_teacher(recipe.teacher))}
    for method, label in METHODS.items():
        folder = runs / family / method
        sources[label] = train(load_recipe(RECIPES[family], method=method), folder, resume=True)
    columns = {}
    for label, folder in sources.items():
        pictures = generate_samples(load_pipeline(folder, torch.float32), recipe.prompts, recipe)
        columns[label] = [as_image(picture) for picture in pictures]
    path = ROOT / "docs" / "images" / f"sheet-{family}.png"
    comparison_sheet(columns, recipe.prompts).save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "sheets")
    options = parser.parse_args()
    for family in options.families:
        print(sheet(family, options.runs))


if __name__ == "__main__":
    main()
