"""Write what `fbqat plan` computes into the heads of the recipes of real checkpoints.

python -m benchmarks.heads              # rewrite; then python -m model_cards
python -m benchmarks.heads --check      # exit 1 if a head is not what is computed; a quarter of an hour for all
"""

from __future__ import annotations

import argparse
import re
import sys

from fbqat_hub.families import FAMILIES
from fbqat_hub.training.advice import fits_at_all, in_parts, launched
from fbqat_hub.training.costs import Costs, costs
from fbqat_hub.training.costs_report import gb, gib
from fbqat_hub.training.gpus import Gpus
from fbqat_hub.training.recipe import RECIPES, load_recipe

_TINY = {family.tiny for family in FAMILIES.values()}
REAL = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in _TINY)
_SEVERAL = Gpus.parse("8x80GB")
_BLOCK = re.compile(r"^# Costs, by `fbqat plan .*\n(?:#   .*\n)+", re.MULTILINE)


def head(name: str, found: Costs) -> str:
    """The lines of a recipe's head, from the first to the last."""
    recipe, pictures = found.recipe, found.pictures or 0
    lines = [
        f"# Costs, by `fbqat plan {name}`:",
        f"#   memory of each device: {gib(found.memory.peak)} (with batch_size 1: {gib(found.memory_of_one.peak)}); "
        f"{gib(found.encoding)} while encoding",
        f"#   disk: teacher {gb(found.download)}, embeddings at most {gb(pictures * found.embeddings)}, latents "
        f"{gb(pictures * found.latents)},",
        f"#   checkpoints {gb(found.checkpoints)}, the result {gb(found.output)}",
    ]
    if not fits_at_all(found, Gpus.parse("1x80GB")):
        lines += [
            "#   No batch size fits a device of 80 GB. Which settings do, block by block:",
            f"#   fbqat plan {name} --gpus 1x80GB --set training=blockwise",
            f"#   Without training: fbqat convert {recipe.teacher} --output {name}-w4a8",
            *_several(name, found),
        ]
    return "\n".join(lines) + "\n"


def _several(name: str, found: Costs) -> list[str]:
    """With every layer shared out to several devices."""
    changed = in_parts(found, _SEVERAL)
    if changed is None or changed.on_each > _SEVERAL.budget:
        return []
    return [
        f"#   {_SEVERAL.count} devices of 80 GB train it with every layer shared out (FSDP2), as computed:",
        *(f"#   {line}" for line in launched(_SEVERAL, name)),
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.heads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help="names (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a head is out of date")
    options = parser.parse_args()
    stale = []
    for name in options.recipes or REAL:
        path = RECIPES / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        if not _BLOCK.search(text):
            raise ValueError(f"{path.name} has no lines of costs; give it one: # Costs, by `fbqat plan {name}`:")
        block = head(name, costs(load_recipe(name)))
        wanted = _BLOCK.sub(lambda _, block=block: block, text, count=1)
        if wanted != text:
            stale.append(name)
            if not options.check:
                path.write_text(wanted, encoding="utf-8")
    print(f"{'out of date' if options.check else 'rewritten'}: {', '.join(stale) or 'none'}")
    if options.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
