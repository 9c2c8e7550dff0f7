"""docs/add-a-family.md, executed: its file alone, entered in the list, is trained, loaded and generates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor

from fbqat_hub.export.bundle.doctor import diagnose_model
from fbqat_hub.families import FAMILIES, Family, component_configs
from fbqat_hub.pipelines import load_pipeline, save_pipeline
from fbqat_hub.training.distill import train
from fbqat_hub.training.generate import generate
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.teacher import untrained_pipeline
from tests.conftest import CAPTIONS, ROOT

PAGE = (ROOT / "docs" / "add-a-family.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture
def lumina(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Family, Path, dict[str, Any]]:
    """The page's family in the list, its tiny pipeline's folder, and the pipeline's call."""
    names: dict[str, Any] = {}
    exec(block("python"), names)
    family = names["Lumina2"]()
    assert family.name not in FAMILIES, "the page's example is of a family that is not supported; choose another one"
    monkeypatch.setitem(FAMILIES, family.name, family)
    recipe = yaml.safe_load(block("yaml"))
    pipeline = untrained_pipeline(recipe, CAPTIONS)
    save_pipeline(pipeline, tmp_path / "teacher")
    size = {**family.native_size(component_configs(pipeline)), **recipe["generation"]}
    assert (size["height"], size["width"]) == (32, 32)
    return family, tmp_path / "teacher", {**size, "num_inference_steps": 2, "guidance_scale": 1.0}


def test_the_page_is_a_family(lumina, recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    family, teacher, call = lumina
    changes = {"family": family.name, "teacher": str(teacher), "generation": call, "steps": 4, "save_every": 0}
    run = train(Recipe(**{**recipe_fields, **changes}), tmp_path / "run", progress=False)
    log = [yaml.safe_load(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < float("inf") for line in log)
    picture = generate(str(run), ["dark red"], tmp_path / "picture.png", seed=3)
    assert picture.stat().st_size > 500
    packed = convert_pipeline(str(teacher), tmp_path / "packed")
    pipeline = DiffusionPipeline.from_pretrained(packed)
    assert type(pipeline).__name__ == family.pipeline_class
    (finding,) = [each for each in diagnose_model(pipeline.transformer) if "exported" in each.what]
    assert finding.what == "a Lumina-Image-2.0 cannot be exported: nobody has written its graph yet."


@torch.no_grad()
def test_its_denoiser_is_given_what_the_pipeline_gives_it(lumina) -> None:
    family, teacher, call = lumina
    pipeline, seen = load_pipeline(teacher), {}
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.register_forward_pre_hook(lambda *given: seen.update(given[2]), with_kwargs=True)
    latents = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    pipeline(prompt="dark red", latents=latents, **{**call, "num_inference_steps": 1})
    conditioning = family.encode_prompts(pipeline, ["dark red"], call)
    inputs = family.denoiser_inputs(latents, pipeline.scheduler.timesteps[:1], conditioning)
    given = {name: value for name, value in seen.items() if isinstance(value, Tensor)}
    assert inputs.keys() == given.keys()
    assert all(torch.equal(inputs[name], value) for name, value in given.items())
