"""The whole life of a model on the Hub: quantize, measure, card, publish, list, load in a fresh process, draw, pull."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops
from transformers import T5EncoderModel

from fbqat_hub import cli
from fbqat_hub.evaluation.results import METRICS
from fbqat_hub.families import FAMILIES
from fbqat_hub.hub.listing import published
from fbqat_hub.hub.manifest import read_manifest
from fbqat_hub.hub.publish import publish
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe, load_recipe
from tests.conftest import subprocess_environment
from tests.hub.conftest import TOKEN
from tests.hub.server import LoopbackHub

RECIPES = [family.tiny for family in FAMILIES.values() if family.tiny]


def run_of(name: str, folder: Path, metric: str, text_encoders: str | None = None) -> Recipe:
    """The shipped teacher of a recipe, quantized without training and measured, with its card."""
    recipe = load_recipe(
        name,
        method="ptq-mse",
        evaluation={"images": 2, "inference_steps": 2, "draws": 1, "batch_size": 2},
        text_encoders=text_encoders,
    )
    recipe.generation["num_inference_steps"] = 2
    convert_pipeline(recipe.teacher, folder, text_encoders=text_encoders)
    recipe.save(folder / "recipe.yaml")
    assert cli.main(["evaluate", str(folder), "--metrics", metric]) == 0
    assert cli.main(["card", str(folder)]) == 0
    return recipe


def live(name: str, hub: LoopbackHub, folder: Path, metric: str, text_encoders: str | None = None) -> None:
    """One model: pasting its card's first block in a fresh process draws what the pulled folder draws."""
    run, repo = folder / "run", f"me/{name}"
    recipe = run_of(name, run, metric, text_encoders)
    publish(run, repo)
    model = next(model for model in published() if model.name == repo)
    assert (model.where, model.family, model.bits) == ("Hub", recipe.family, "W4A8")
    assert model.metric.startswith(f"{METRICS[metric].title} ")

    card = hub.repositories[repo].files["README.md"].content.decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert f'from_pretrained("{repo}"' in code[1]
    fresh = subprocess_environment(
        HF_ENDPOINT=hub.url, HF_HOME=str(folder / "home"), HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1"
    )
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=folder, env=fresh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert cli.main(["pull", repo, "--output", str(folder / "pulled"), "--for", "diffusers"]) == 0
    manifest = read_manifest(folder / "pulled")
    assert (manifest.family, manifest.method, manifest.license) == (recipe.family, "ptq-mse", "cc-by-sa-4.0")
    call = [
        str(folder / "pulled"),
        recipe.prompts[0],
        "--seed",
        str(recipe.seed),
        "--output",
        str(folder / "again.png"),
    ]
    assert cli.main(["generate", *call]) == 0
    drawn, again = Image.open(folder / "picture.png"), Image.open(folder / "again.png")
    assert drawn.size == (64, 64)
    assert len(drawn.getcolors(64 * 64) or ()) > 16  # no single colour
    assert ImageChops.difference(drawn, again).getbbox() is None


def test_one_family(hub: LoopbackHub, tmp_path: Path) -> None:
    live(RECIPES[0], hub, tmp_path, "bits_per_weight")
    config = tmp_path / "pulled" / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    for load in (DiffusionPipeline.from_pretrained, load_pipeline):
        with pytest.raises(ValueError, match=r"transformer/config.json has \d+ bytes of \d+. Fetch it again"):
            load(tmp_path / "pulled")


@pytest.mark.slow
def test_quantized_text_encoders(hub: LoopbackHub, tmp_path: Path) -> None:
    live("flux-schnell-tiny", hub, tmp_path, "bits_per_weight", "w8a8")
    folder = tmp_path / "pulled" / "text_encoder_2"
    assert list(named_layers(T5EncoderModel.from_pretrained(folder), PackedLayer))
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"text_encoder_2/config.json has \d+ bytes of \d+. Fetch it again"):
        T5EncoderModel.from_pretrained(folder)


@pytest.mark.slow
def test_all_families_on_one_hub(hub: LoopbackHub, tmp_path: Path, capsys) -> None:
    for name in RECIPES:
        live(name, hub, tmp_path / name, "psnr")
    capsys.readouterr()
    assert cli.main(["list", "--runs", str(tmp_path / RECIPES[0])]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
    families = [load_recipe(name).family for name in RECIPES]
    on_hub = sorted(row for row in rows if row[1] == "Hub")
    assert on_hub == sorted(
        [f"me/{name}", "Hub", family, "W4A8"] for name, family in zip(RECIPES, families, strict=True)
    )
    assert sorted(row[1] for row in rows if row[1] != "Hub") == ["run", "run"]  # the run, and what was pulled
