"""Write the cards of the zoo, model_cards/NAME/README.md, from model_cards/NAME.yaml and what was measured.

python -m model_cards                              # rewrite all cards
python -m model_cards --check                      # exit 1 if a card is not what its files say
python -m model_cards --collect sana-tiny runs/x   # take over what a finished run measured, then rewrite
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fbqat_hub.hub.card import Facts, card, facts_of_run, read_recipe
from fbqat_hub.hub.card_data import read_card_data
from fbqat_hub.hub.tables import files_of
from fbqat_hub.training.recipe import RECIPES, load_recipe
from fbqat_hub.untrusted import read_json, read_yaml

ROOT = Path(__file__).parent
# Of a run's folder; the weights stay where they are, and only their sizes are taken over.
KEPT = (
    "recipe.yaml", "results.json", "images/comparison.png", "images/curve.png", "images/widths.png",
    "htp/certificate.json",
)  # fmt: skip
SIZES = "files.json"


def models() -> list[str]:
    """Names of the zoo, in order."""
    return sorted(path.stem for path in ROOT.glob("*.yaml"))


def collect(name: str, run: Path) -> None:
    """Take over what a run measured, in place of what was there.

    Raises:
        FileNotFoundError: no such model, or no finished and evaluated run.
        ValueError: the run is of another recipe.
    """
    if name not in models():
        raise FileNotFoundError(f"model_cards/{name}.yaml is missing; models: {', '.join(models())}.")
    if facts_of_run(run).recipe["name"] != load_recipe(name).name:
        raise ValueError(f"{run} is a run of {facts_of_run(run).recipe['name']}, not of the recipe {name}.")
    target = ROOT / name
    shutil.rmtree(target, ignore_errors=True)
    for file in KEPT:
        if (run / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / file, target / file)
    (target / SIZES).write_text(json.dumps(files_of(run), indent=1) + "\n")


def zoo_card(name: str) -> str:
    """The card of a model of the zoo.

    Raises:
        ValueError: the data file has an unknown key.
    """
    data: dict[str, Any] = read_yaml(ROOT / f"{name}.yaml")
    shipped, folder = RECIPES / f"{data['recipe']}.yaml", ROOT / name
    run = f"runs/{name}"
    own = {"source": run, "made_by": f"fbqat train {data['recipe']} --output {run}"}
    if "repo" in data:
        own = {"source": data["repo"], "made_by": ""}
    given: dict[str, Any] = {"data": read_card_data(ROOT / f"{name}.yaml"), **own}
    if not (folder / "results.json").is_file():
        load_recipe(shipped)  # what is not valid has no card
        return card(Facts(recipe=read_recipe(shipped), recipe_text=shipped.read_text(), records=[], **given))
    facts = facts_of_run(folder)
    files = [(path, size, use) for path, size, use in read_json(folder / SIZES)]
    return card(Facts(**{**vars(facts), "files": files, **given}))


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--collect", nargs=2, metavar=("NAME", "RUN"))
    options = parser.parse_args()
    if options.collect:
        collect(options.collect[0], Path(options.collect[1]))
    stale = []
    for name in models():
        path, text = ROOT / name / "README.md", zoo_card(name)
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if not options.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    print(f"{'stale' if options.check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
