"""The heads of recipes say what is computed."""

from __future__ import annotations

import pytest

from benchmarks.heads import REAL, head
from fbqat_hub.training.costs import costs
from fbqat_hub.training.recipe import RECIPES, load_recipe


def _text(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_head_says_what_a_run_costs(name: str) -> None:
    assert head(name, costs(load_recipe(name))) in _text(name)


@pytest.mark.parametrize("name", REAL)
def test_every_head_says_costs_of_its_own(name: str) -> None:
    """What can be computed at once: the disk that embeddings of this recipe's captions take."""
    from fbqat_hub.families import get_family
    from fbqat_hub.training.bases import configs_of

    recipe, text = load_recipe(name), _text(name)
    assert f"# Costs, by `fbqat plan {name}`:\n#   memory of each device: " in text
    family, config = get_family(recipe.family), configs_of(recipe.teacher)["transformer"]
    tokens = family.text_tokens(recipe.generation) + (77 if recipe.family == "sd3" else 0)
    defaults = {"sana": 2304, "sana-sprint": 2304, "flux": 4096, "flux-kontext": 4096, "sd3": 4096, "z-image": 2560}
    width = config.get("joint_attention_dim") or config.get("caption_channels") or defaults.get(recipe.family, 3584)
    low = 48_000 * tokens * width * 2 / 1e9
    said = float(text.partition("embeddings at most ")[2].split()[0])
    assert low <= said + 0.05 <= low * 1.01 + 0.1
