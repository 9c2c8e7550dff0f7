"""Pictures from a packed pipeline: the right size, the same for a seed, nothing written when it fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fbqat_hub.generation import generate_pictures
from fbqat_hub.pictures import pixels
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.generate import generate, generation_of
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import SHIPPED
from tests.conftest import CALL, call_of


def test_picture_has_the_recipes_size_and_depends_on_the_seed_only(run_folder: Path, tmp_path: Path) -> None:
    paths = [
        generate(str(run_folder), ["dark red"], tmp_path / name / "out.png", seed=seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    a, b, c = (Image.open(path) for path in paths)
    assert (a.format, a.size) == ("PNG", (32, 32))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_several_prompts_make_a_grid_each_from_the_next_seed(run_folder: Path, tmp_path: Path) -> None:
    both = generate(str(run_folder), ["red", "red"], tmp_path / "both.png", seed=3)
    second = generate(str(run_folder), ["red"], tmp_path / "second.png", seed=4)
    grid, tile = np.asarray(Image.open(both)), np.asarray(Image.open(second))
    assert grid.shape[1] >= 64
    windows = np.lib.stride_tricks.sliding_window_view(grid, tile.shape).reshape(-1, *tile.shape)
    # a batch of two and a batch of one differ by float rounding: at most one level of 255
    assert abs(windows.astype(int) - tile).max(axis=(1, 2, 3)).min() <= 1


def test_arguments_of_the_call_can_be_changed(run_folder: Path, tmp_path: Path) -> None:
    path = generate(str(run_folder), ["red"], tmp_path / "out.png", call={"height": 64})
    assert Image.open(path).size == (32, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["red", "  "]}, "no prompt, or an empty one"),
        ({"call": {"hight": 64}}, r"the call of SanaPipeline\): 'hight' \(did you mean 'height'\?\)"),
        ({"call": {"height": 33}}, "--set height is 33; it must be a multiple of 32 from 32 to 8192"),
        ({"call": {"height": "sixty"}}, "--set height is 'sixty'; it must be a multiple of 32"),
        ({"call": {"num_inference_steps": 1.5}}, "--set num_inference_steps is 1.5; it must be a whole number from 1"),
        ({"call": {"num_inference_steps": 0}}, "--set num_inference_steps is 0; it must be a whole number from 1"),
        ({"call": {"num_images_per_prompt": 10**9}}, "--set num_images_per_prompt is 1000000000; .* from 1 to 64"),
        ({"call": {"guidance_scale": float("nan")}}, "--set guidance_scale is nan; it must be a number"),
        ({"call": {"prompt_embeds": 3}}, "'prompt_embeds'"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 2**70}, "the seed is 1180591620717411303424"),
        ({"prompts": ["red"] * 2, "seed": 2**32 - 1}, "for 2 pictures it is a whole number from 0 to 4294967294"),
        ({"device": "cuda:7"}, "device is cuda:7, but this machine has"),
        ({"name": "out.jpg"}, "out.jpg; it must be a file that ends in .png"),
        ({"name": "folder.png"}, "it must be a file that ends in .png"),
    ],
)
def test_refused_and_nothing_written(arguments: dict[str, Any], message: str, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    given = {"prompts": ["red"], "name": "out.png", **arguments}
    with pytest.raises(ValueError, match=message):
        generate(str(run_folder), given.pop("prompts"), tmp_path / given.pop("name"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_several_pictures_of_a_prompt_are_those_of_the_following_seeds(run_folder: Path, tmp_path: Path) -> None:
    """Of prompts of unlike lengths, whose attention masks differ."""
    prompts = ["red", "dark green square"]
    many = generate(str(run_folder), prompts, tmp_path / "a.png", seed=3, call={"num_images_per_prompt": 2})
    texts = [prompt for prompt in prompts for _ in range(2)]
    same = generate(str(run_folder), texts, tmp_path / "b.png", seed=3)
    assert np.array_equal(Image.open(many), Image.open(same))
    two = generate(str(run_folder), ["red"], tmp_path / "c.png", call={"num_images_per_prompt": 2})
    assert Image.open(two).size == (2 * 32 + 3 * 4, 32 + 2 * 4)  # a grid of two


def test_an_empty_negative_prompt_is_ordinary(run_folder: Path, tmp_path: Path) -> None:
    empty = generate(str(run_folder), ["red"], tmp_path / "a.png", call={"negative_prompt": ""})
    without = generate(str(run_folder), ["red"], tmp_path / "b.png")
    assert empty.read_bytes() == without.read_bytes()


@pytest.mark.parametrize(
    ("family", "change", "size"),
    [
        ("flux-kontext", {"height": 64}, (32, 64)),  # not at the area that it was made for
        ("sana-sprint", {"num_inference_steps": 3}, (32, 32)),
        ("z-image", {"negative_prompt": "grey", "guidance_scale": 2.0, "num_images_per_prompt": 2}, (76, 40)),
    ],
)
def test_a_change_that_the_pipeline_does_not_follow_itself(family, change, size, teacher_of, tmp_path: Path) -> None:
    recipe = {"name": "Tiny", "family": family, "teacher": "none/none", "method": "ptq-mse", "generation": {}}
    shutil.copytree(teacher_of(family), tmp_path / "run")
    call = call_of(family, load_pipeline(tmp_path / "run"))
    Recipe(**{**recipe, "generation": call}).save(tmp_path / "run" / "recipe.yaml")
    path = generate(str(tmp_path / "run"), ["red"], tmp_path / "out.png", call=change)
    assert Image.open(path).size == size


def test_a_float_pipeline_without_a_recipe_is_run_at_its_own_size(tiny_sana: Path, tmp_path: Path) -> None:
    steps = {"num_inference_steps": 2, "complex_human_instruction": None, "max_sequence_length": 8}
    path = generate(str(tiny_sana), ["red"], tmp_path / "out.png", call=steps)
    assert Image.open(path).size == (32, 32)  # 4 x 4 latents by 8


@pytest.mark.parametrize("name", SHIPPED)
def test_a_teacher_that_ships_is_called_as_its_recipe_says(name: str) -> None:
    """Not with 512 tokens of T5, nor with the long instruction before the prompt that SanaPipeline has by default."""
    recipe = load_recipe(name.removeprefix("fbqat-hub/").removesuffix("-openmoji"))
    pipeline = load_pipeline(SHIPPED[name])
    assert generation_of(SHIPPED[name], pipeline) == recipe.generation


def test_pictures_are_those_of_the_pipeline_to_the_bit(run_folder: Path) -> None:
    pipeline = load_pipeline(run_folder, torch.float32)
    own = pipeline(["red", "sky"], generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)], **CALL).images
    assert torch.equal(generate_pictures(pipeline, ["red", "sky"], CALL, [5, 6]), pixels(own))


@pytest.mark.parametrize(
    ("part", "tensor", "level", "message"),
    [
        (
            "transformer",
            "proj_out.bias",
            3e38,
            r"1 of 1 pictures of SanaPipeline are not finite \(NaN\), .* 'red', seed 0",
        ),
        ("vae", "decoder.", 0.0, "picture 1 of 1, seed 0, is of one colour throughout"),
    ],
)
def test_a_broken_model_is_refused(
    part: str, tensor: str, level: float, message: str, run_folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    (file,) = (run / part).glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.startswith(tensor):
            tensors[name].fill_(level)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        generate(str(run), ["red"], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_full_disk_leaves_the_older_picture(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.png").write_bytes(b"older")

    def full(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        generate(str(run_folder), ["red"], tmp_path / "out.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]
