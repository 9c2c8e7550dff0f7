"""A sheet of the hard cases beside what ships: the teacher, and its students of one method and seed.

python -m benchmarks.method.sheet                     # docs/images/hard-sana.png, some ten minutes
python -m benchmarks.method.sheet --families sana flux
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.method.runs import RECIPES, Bench, Setting
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.pictures import as_image
from fbqat_hub.training.recipe import load_recipe

IMAGES = Path(__file__).parents[2] / "docs" / "images"
# Column -> track.
COLUMNS = {"W3A8": "hard-w3a8", "W4A4": "hard-w4a4", "W4A8": "uniform-4", "W4.5A8 on average": "mixed-4.5"}
STEPS, RATE, SEED = 400, 1e-4, 1


def sheet(family: str) -> Path:
    """Train a student for each column and draw the recipe's prompts with all."""
    bench, recipe = Bench(family), load_recipe(RECIPES[family])
    denoisers = {"teacher": bench.teacher}
    for label, track in COLUMNS.items():
        setting = Setting(family=family, track=track, method="fbqat", steps=STEPS, rate=RATE, seed=SEED)
        denoisers[label], _ = bench.student(setting)
    columns = {
        label: [as_image(picture) for picture in bench.draw(denoiser, recipe.prompts, recipe)]
        for label, denoiser in denoisers.items()
    }
    path = IMAGES / f"hard-{family}.png"
    comparison_sheet(columns, recipe.prompts).save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=RECIPES, default=["sana"])
    for family in parser.parse_args().families:
        print(sheet(family))


if __name__ == "__main__":
    main()
