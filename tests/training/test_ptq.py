"""Conversion without training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fbqat_hub.components import Component
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.distill import train
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import SHIPPED
from tests.conftest import subprocess_environment

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("clip", "method"), [("mse", "ptq-mse"), ("max_abs", "ptq-maxabs")])
def test_equals_the_recipe_of_that_method(clip, method, tiny_sana: Path, recipe_fields, tmp_path: Path) -> None:
    """`fbqat convert` and `fbqat train` of a method without training are two ways to the same tensors."""
    converted = convert_pipeline(str(tiny_sana), tmp_path / "converted", {"weight_clip": clip})
    recipe = Recipe(**{**recipe_fields, "method": method, "steps": 0})
    trained = train(recipe, tmp_path / "trained", progress=False)
    left, right = load_file(converted / WEIGHTS), load_file(trained / WEIGHTS)
    assert set(left) == set(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_recipe_beside_it_says_how(tiny_sana: Path, tmp_path: Path) -> None:
    settings = {"weight_clip": "mse", "modules_to_not_convert": ["*.attn2.*"], "module_overrides": {}}
    folder = convert_pipeline(str(tiny_sana), tmp_path / "tiny-w4a8", settings)
    recipe = load_recipe(folder / "recipe.yaml")
    assert (recipe.name, recipe.method, recipe.family, recipe.steps) == ("tiny-w4a8", "ptq-mse", "sana", 0)
    assert recipe.generation["height"] == 32
    written = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert written["module_overrides"] == recipe.config().module_overrides == {}
    assert len(written["modules_to_not_convert"]) == 8
    assert load_pipeline(folder).transformer.proj_out.activation_bits == 8


def test_groups_are_those_of_the_recipe(tiny_sana: Path, tmp_path: Path) -> None:
    folder = convert_pipeline(str(tiny_sana), tmp_path / "out", {"group_size": 8})
    config = load_recipe(folder / "recipe.yaml").config()
    assert (config.weight_granularity, config.group_size) == ("per_group", 8)
    layer = load_pipeline(folder).transformer.transformer_blocks[0].attn1.to_q
    assert layer.weight_scale.shape == (layer.out_features, layer.in_features // 8)


@pytest.mark.parametrize("source", ["fbqat-hub/sana-tiny-openmoji", SHIPPED["fbqat-hub/sana-tiny-openmoji"]])
def test_a_teacher_that_ships_is_called_as_its_recipe_says(source: str | Path, tmp_path: Path) -> None:
    """Not with the long instruction before the prompt that SanaPipeline has by default."""
    made = load_recipe(convert_pipeline(str(source), tmp_path / "out") / "recipe.yaml")
    assert made.generation == load_recipe("sana-tiny").generation
    other = convert_pipeline(str(source), tmp_path / "other", call={"num_inference_steps": 3})
    assert load_recipe(other / "recipe.yaml").generation == {**made.generation, "num_inference_steps": 3}


def test_last_layer_has_16_bit_activations_by_default(tiny_sana: Path, tmp_path: Path) -> None:
    folder = convert_pipeline(str(tiny_sana), tmp_path / "out")
    assert load_pipeline(folder).transformer.proj_out.activation_bits == 16
    assert load_recipe(folder / "recipe.yaml").config().module_overrides == {"proj_out": {"bits": 16}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_not_convert": ["proj_uot"]}, "'proj_uot' matches no linear layer"),
        ({"weight_clp": "mse"}, r"'weight_clp' \(did you mean 'weight_clip'\?\)"),
        ({"activation_range": "static"}, "cannot calibrate"),
    ],
)
def test_wrong_settings_leave_nothing(settings: dict[str, Any], message: str, tiny_sana: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert_pipeline(str(tiny_sana), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_wrong_sources(run_folder: Path, tiny_sana: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_sana, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "DallePipeline"}))
    for source, error, message in (
        (run_folder, ValueError, "is quantized already; give the full-precision pipeline"),
        (tiny_sana / "vae", ValueError, "is not a diffusers pipeline: it has no model_index.json"),
        (tmp_path / "missing", FileNotFoundError, "is no folder, nor a Hub id"),
        (other, ValueError, "DallePipeline is of no supported family; supported pipelines: SanaPipeline"),
    ):
        with pytest.raises(error, match=message):
            convert_pipeline(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_with_content_is_untouched(tiny_sana: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty; give another --output"):
        convert_pipeline(str(tiny_sana), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_stopped_while_saving_leaves_the_folder_as_it_was(error, tiny_sana: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    (tmp_path / "there").mkdir()
    for output in (tmp_path / "there", tmp_path / "new"):
        with monkeypatch.context() as patch:
            patch.setattr("fbqat_hub.weights.TensorFile.write", stop)  # of the last part
            with pytest.raises(type(error)):
                convert_pipeline(str(tiny_sana), output)
        assert not any(output.iterdir()) if output.name == "there" else not output.exists()
        convert_pipeline(str(tiny_sana), output)


def test_a_killed_conversion_leaves_nothing_whole_and_can_be_run_again(tiny_sana: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from fbqat_hub.training.ptq import convert_pipeline\n"
        "from fbqat_hub.weights import TensorFile\n"
        "TensorFile.write = lambda *_: os.kill(os.getpid(), 9)\n"
        "convert_pipeline(sys.argv[1], Path(sys.argv[2]))"
    )
    output = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", program, str(tiny_sana), str(output)], env=subprocess_environment())
    assert done.returncode == -9
    assert [path.name for path in output.iterdir()] == [".partial"]
    convert_pipeline(str(tiny_sana), output, progress=False)
    assert sorted(path.name for path in output.glob(".*")) == []
    load_pipeline(output)


def test_no_part_is_loaded(tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a model of many gigabytes pass through tensor by tensor."""
    loaded, load = [], Component.load

    def watched(component: Component, *args: Any, **options: Any) -> Any:
        if component.is_model and not options.get("meta"):
            loaded.append(component.class_name)
        return load(component, *args, **options)

    monkeypatch.setattr(Component, "load", watched)
    convert_pipeline(str(tiny_sana), tmp_path / "out")
    assert loaded == []


def test_what_is_not_packed_keeps_its_dtype(half_sana: Path, tmp_path: Path) -> None:
    stored = load_file(half_sana / WEIGHTS)
    packed = load_file(convert_pipeline(str(half_sana), tmp_path / "out") / WEIGHTS)
    kept = set(stored) & set(packed)
    assert {"scale_shift_table", "proj_out.bias"} <= kept
    assert all(packed[name].dtype == torch.float16 and packed[name].equal(stored[name]) for name in kept)
