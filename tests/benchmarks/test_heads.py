"""The heads of recipes say what is computed."""

from __future__ import annotations

import pytest
import yaml

from benchmarks.heads import REAL, head
from fbqat_hub.training.bases import configs_of
from fbqat_hub.training.costs import cached_bytes, costs
from fbqat_hub.training.costs_report import gb
from fbqat_hub.training.recipe import RECIPES, load_recipe
from tests.conftest import ROOT


def _text(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_head_says_what_a_run_costs(name: str) -> None:
    assert head(name, costs(load_recipe(name))) in _text(name)


@pytest.mark.parametrize("name", REAL)
def test_every_head_says_costs_of_its_own(name: str) -> None:
    """What is computed at once: the disk that latents and embeddings take."""
    recipe, text = load_recipe(name), _text(name)
    assert f"# Costs, by `fbqat plan {name}`:\n#   memory of each device: " in text
    embeddings, latents = (48_000 * size for size in cached_bytes(recipe, configs_of(recipe.teacher)))
    assert f"embeddings at most {gb(embeddings)}, latents {gb(latents)}," in text


@pytest.mark.parametrize("name", REAL)
def test_every_head_says_the_licence_of_the_base_model(name: str) -> None:
    """That of its card, which says what may be passed on."""
    data = yaml.safe_load((ROOT / "model_cards" / f"{name}.yaml").read_text(encoding="utf-8"))
    licence = data["license_name"] if data["license"] == "other" else data["license"]
    line = f"# Licence of the base model: {licence}; what may be passed on: model_cards/{name}.yaml.\n"
    assert (data["recipe"], line in _text(name)) == (name, True)
