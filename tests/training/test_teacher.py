"""Teachers: each stage trains, a plain pipeline comes out, a run that was stopped goes on to the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.families import FAMILIES
from fbqat_hub.pictures import pixels
from fbqat_hub.training import teacher
from fbqat_hub.training.teacher import train_teacher, untrained_pipeline
from fbqat_hub.training.tokenizers import train_tokenizer
from tests.conftest import VARIANTS, call_of, teacher_recipe

# smileys, animals, food, symbols
CODES = {"1F600": "grinning face", "1F63E": "pouting cat", "1F436": "dog face", "1F34E": "red apple", "2705": "check"}


def squares(size: int) -> dict[str, dict[str, list[Any]]]:
    """In place of OpenMoji: two pictures of a caption."""
    images = [Image.linear_gradient("L").resize((size, size)).rotate(30 * index).convert("RGB") for index in range(10)]
    return {"train": {"image": images, "caption": [*CODES.values()] * 2, "hexcode": [*CODES] * 2}}


def short(family: str) -> dict[str, Any]:
    """The recipe of the family's teacher with three steps in each stage, long enough to be seen in float16."""
    recipe = teacher_recipe(family)
    for stage in ("autoencoder_training", "denoiser_training", "few_step"):
        if stage in recipe:
            recipe[stage].update(steps=3, batch_size=4, learning_rate=0.2)
    for index, phase in enumerate(recipe["denoiser_training"]["focus"]):
        phase["after"] = index
    if "few_step" in recipe:
        recipe["few_step"].update(noises=2, substeps=2)
    return recipe


def weights_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{path.parent.name}.{name}": value for path in files for name, value in load_file(path).items()}


@pytest.fixture(scope="module", autouse=True)
def small_world() -> Iterator[None]:
    """Squares for OpenMoji, a checkpoint after each step, one tokenizer a class: learning breaks ties by chance."""

    learned: dict[str, Any] = {}

    def learn(kind: str, *rest: Any) -> Any:
        if kind not in learned:
            learned[kind] = train_tokenizer(kind, *rest)
        return learned[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "load_openmoji", squares)
        patch.setattr(teacher, "train_tokenizer", learn)
        patch.setattr(teacher, "_SAVE_EVERY", 1)
        yield


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in VARIANTS])
def trained(request: pytest.FixtureRequest, small_world, tmp_path_factory) -> tuple[str, Path]:
    """A family, and the folder of its teacher after the three steps of each stage."""
    output = tmp_path_factory.mktemp("teachers") / request.param
    train_teacher(short(request.param), output)
    return request.param, output


def test_every_stage_trains(trained) -> None:
    """Autoencoder, each text encoder and the denoiser are not what they were at the start."""
    family, folder = trained
    recipe = short(family)
    start = untrained_pipeline(recipe, [*CODES.values()] * 2, DiffusionPipeline.from_pretrained(folder).vae)
    start.vae = untrained_pipeline(recipe, [*CODES.values()] * 2).vae
    weights = weights_of(folder)
    for part in ("vae", "transformer", *recipe["text_encoders"]):
        moved = [
            not torch.equal(weights[f"{part}.{name}"], value.half())
            for name, value in getattr(start, part).named_parameters()
        ]
        assert sum(moved) > 0.6 * len(moved), part  # Z-Image takes the last layer but one of three


@torch.no_grad()
def test_is_a_plain_pipeline_that_draws(trained) -> None:
    family, folder = trained
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == FAMILIES[family].pipeline_class
    assert {value.dtype for value in weights_of(folder).values() if value.is_floating_point()} == {torch.float16}
    picture = pipeline(prompt="pouting cat", **call_of(family, pipeline)).images[0]
    assert picture.size == (32, 32)
    assert sorted(path.name for path in folder.parent.iterdir()) == [family]


@torch.no_grad()
def test_latents_have_the_deviation_of_the_noise(trained) -> None:
    family, folder = trained
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    x = pixels(squares(32)["train"]["image"]).float() / 127.5 - 1
    latents = FAMILIES[family].encode_images(pipeline, x)
    assert latents.square().mean().item() == pytest.approx(1, rel=0.01)
    if teacher_recipe(family).get("centre_latents"):
        assert latents.mean().item() == pytest.approx(0, abs=0.01)


def test_stopped_run_goes_on_to_the_same_weights(trained, tmp_path: Path, monkeypatch) -> None:
    """Stopped in the last stage after its second step: the tokenizers and the other stages are not made anew."""
    family, folder = trained
    recipe = short(family)
    stage = "few_step" if "few_step" in recipe else "denoiser"
    save, steps = teacher.save_checkpoint, []

    def stop(where: Path, done: int, *rest: Any) -> None:
        if (where.name, done) == (stage, 2):
            raise KeyboardInterrupt
        save(where, done, *rest)

    def count(where: Path, done: int, *rest: Any) -> None:
        steps.append((where.name, done))
        save(where, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(recipe, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "save_checkpoint", count)
        patch.setattr(teacher, "train_tokenizer", None)
        train_teacher(recipe, tmp_path / "cut")
    assert steps == [(stage, 2), (stage, 3)]
    expected, resumed = weights_of(folder), weights_of(tmp_path / "cut")
    assert set(resumed) == set(expected)
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


def test_run_of_another_recipe_is_not_continued(tmp_path: Path, monkeypatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = short("pixart-sigma")
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "save_pipeline", stop)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(recipe, tmp_path / "out")
    recipe["denoiser_training"]["learning_rate"] = 0.1
    with pytest.raises(ValueError, match="made with another recipe, so it cannot be continued"):
        train_teacher(recipe, tmp_path / "out")


def test_teachers_with_the_same_autoencoder_share_it(tmp_path: Path) -> None:
    """Same recipe of the autoencoder, same folder in the cache, which the latent scale of a teacher does not change."""
    images = pixels(squares(32)["train"]["image"])
    recipes = [short(family) for family in ("sd3", "flux")]
    assert recipes[0]["autoencoder"] == recipes[1]["autoencoder"]
    first = teacher._autoencoder(recipes[0], images)
    kept = {path: path.stat().st_mtime_ns for path in default_cache_dir().glob("teachers/*/*")}
    teacher._set_latent_scale(recipes[0], first, images)
    second = teacher._autoencoder(recipes[1], images)
    assert second.config.scaling_factor == recipes[1]["autoencoder"]["scaling_factor"] != first.config.scaling_factor
    assert {path: path.stat().st_mtime_ns for path in default_cache_dir().glob("teachers/*/*")} == kept
    assert [*default_cache_dir().glob("teachers/*.partial*")] == []
