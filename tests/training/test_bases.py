"""What is known of real bases without a download: their configs build models of the published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fbqat_hub.training import bases
from fbqat_hub.training.bases import configs_of, parameters
from fbqat_hub.training.recipe import RECIPES, load_recipe

# Millions of parameters; SD3.5's weight files have its table of positions beside them.
PUBLISHED = {
    "sana-600m": {"transformer": 592, "text_encoder": 2614},
    "sana-1.6b": {"transformer": 1604},
    "sana-1.5-1.6b": {"transformer": 1605},
    "sana-1.5-4.8b": {"transformer": 4722},
    "pixart-sigma": {"transformer": 611, "text_encoder": 4762, "vae": 83.65},
    "sd3.5-medium": {"transformer": 2243, "text_encoder": 123.7, "text_encoder_2": 694.7},
    "sd3.5-large": {"transformer": 8057},
    "flux-schnell": {"transformer": 11891, "text_encoder": 123},
    "flux-dev": {"transformer": 11901},
    "flux2-klein-4b": {"transformer": 3876, "text_encoder": 4022},
    "flux2-klein-base-4b": {"transformer": 3876},
    "z-image-turbo": {"transformer": 6155},
    "z-image": {"transformer": 6155},
    "qwen-image": {"transformer": 20430, "text_encoder": 8292},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_that_are_published(name: str) -> None:
    found = parameters(load_recipe(name).teacher)
    for component, millions in PUBLISHED[name].items():
        assert found[component] == pytest.approx(millions * 1e6, rel=1e-3), component


def test_every_recipe_has_configs_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its denoiser's class, too."""
    import huggingface_hub

    from fbqat_hub.families import get_family

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    for path in RECIPES.glob("*.yaml"):
        recipe = load_recipe(path)
        configs = configs_of(recipe.teacher)
        assert configs["transformer"]["class"] == get_family(recipe.family).denoiser_class, path.name
        assert configs["vae"]["class"] == get_family(recipe.family).autoencoder_class, path.name


def test_of_another_id_only_configs_are_downloaded(tiny_sana: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **given: [asked.update(given, repo=repo), str(tiny_sana)][1]
    )
    assert bases.configs_of("me/my-finetune").keys() == {"transformer", "vae", "text_encoder"}
    patterns = ["model_index.json", "*/config.json"]
    assert asked == {"repo": "me/my-finetune", "revision": None, "allow_patterns": patterns}
    bases.configs_of("me/my-finetune@v2")
    assert (asked["repo"], asked["revision"]) == ("me/my-finetune", "v2")
    known = "Efficient-Large-Model/Sana_600M_512px_diffusers"
    assert bases.configs_of(f"{known}@v2") == bases.configs_of(known)


def test_a_class_that_is_no_model_is_named() -> None:
    with pytest.raises(ValueError, match="Popen is no model of diffusers or transformers"):
        bases.build({"class": "Popen"})
