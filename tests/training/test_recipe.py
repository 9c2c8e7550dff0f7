"""Recipes: the shipped ones load, methods mean what they say, and mistakes are named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from fbqat_hub.families import FAMILIES
from fbqat_hub.quantization import BitSchedule
from fbqat_hub.training.recipe import METHODS, RECIPES, Recipe, load_recipe
from tests.conftest import write_recipe

MINIMAL = {"name": "x", "family": "sana", "teacher": "owner/name"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_loads_by_name_and_by_path(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(path) == load_recipe(path.name)
    assert recipe.family in FAMILIES
    assert recipe.license
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("name", "rate", "batch_size"),
    [
        ("sana-600m", 1e-7, 128),
        ("pixart-sigma", 1e-6, 128),
        ("sd3.5-medium", 1e-6, 256),
        ("flux-schnell", 1e-6, 128),
    ],
)
def test_recipes_of_real_models_have_the_papers_budget(name: str, rate: float, batch_size: int) -> None:
    """25 epochs of 45 600 pictures; as published, at the paper's widths: 14 of them at 4 bits."""
    recipe = load_recipe(name)
    assert recipe.method == "fbqat"
    assert (recipe.learning_rate, recipe.batch_size, recipe.seed) == (rate, batch_size, 1234)
    epoch = 45_600 // batch_size
    assert recipe.steps == 25 * epoch
    schedule = load_recipe(name, method="fbqat-paper").bit_schedule()
    at = [schedule.bit_width((number * epoch + 1) / recipe.steps) for number in range(25)]
    assert at == [8, 7, 6, 5.5, 5, *[4.75] * 2, *[4.5] * 2, *[4.25] * 2, *[4] * 14]
    assert recipe.license_link.startswith("https://")


@pytest.mark.parametrize("method", METHODS)
def test_method_presets(method: str) -> None:
    """A method changed on the command line brings its own steps, clip and schedule."""
    recipe = load_recipe("sana-tiny", method=method)
    assert (recipe.steps == 0) == method.startswith("ptq")
    clip = {"ptq-mse": "mse", "ptq-gptq": "mse", "lsq-qat": "learned", "fbqat": "learned"}.get(method, "max_abs")
    assert recipe.config().weight_clip == clip
    widths = {"integer": "integer", "simple": "simple", "fbqat-paper": "paper"}
    assert recipe.bit_schedule().stages == BitSchedule.preset(widths.get(method, "constant")).stages
    assert (recipe.rounding_at(0).softness > 0) == (method == "fbqat")
    assert recipe.rounding_at(1).softness == 0


def test_recipe_wins_over_method_and_family() -> None:
    recipe = Recipe(
        **MINIMAL,
        method="fbqat-paper",
        quantization={"weight_clip": "mse", "module_overrides": {}},
        schedule={"stages": [[8, 1], [5, 1], [4, 3]]},
        rounding={"ewgs": 0.2},
    )
    assert recipe.config().weight_clip == "mse"
    assert recipe.config().module_overrides == {}
    assert Recipe(**MINIMAL).config().module_overrides == {"proj_out": {"bits": 16}}
    assert recipe.bit_schedule().bit_width(0.25) == 5
    assert recipe.rounding_at(0.5).ewgs == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # unknown keys name the nearest
        ({"learning_rat": 1.0}, r"'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ({"schedule": {"presets": "paper"}}, r"schedule: 'presets' \(did you mean 'preset'\?\)"),
        ({"schedule": {"preset": "papr"}}, "preset is 'papr'; allowed: .*'paper'"),
        ({"quantization": {"weight_clp": "mse"}}, r"'weight_clp' \(did you mean 'weight_clip'\?\)"),
        ({"rounding": {"egws": 0.1}}, r"rounding: 'egws' \(did you mean 'ewgs'\?\)"),
        ({"evaluation": {"image": 4}}, r"evaluation: 'image' \(did you mean 'images'\?\)"),
        ({"calibration": {"sample": 4}}, r"calibration: 'sample' \(did you mean 'samples'\?\)"),
        # stages that the schedule does not have
        (
            {"keep_stages": [6]},
            "6 bits, which the schedule of method fbqat does not leave; it holds none. Methods with",
        ),
        (
            {"method": "fbqat-paper", "steps": 100, "keep_stages": [8, 4]},
            "asks for 4 bits, .* those it holds before its last, over 100 steps, are 8, 7, 6, 5",
        ),
        ({"method": "fbqat-paper", "steps": 3, "keep_stages": [7]}, "asks for 7 bits, .* over 3 steps, are 8"),
        ({"method": "fbqat-paper", "keep_stages": [5.5]}, "each of keep_stages is 5.5; it must be a whole number"),
        ({"method": "fbqat-paper", "keep_stages": 6}, "keep_stages is 6; it must be a list of whole numbers"),
        # choices
        ({"method": "fbqta"}, "method is 'fbqta'; allowed: .*fbqat-paper"),
        ({"method": ["fbqat"]}, r"method is \['fbqat'\]"),
        ({"family": "dalle"}, "family is 'dalle'; supported: sana"),
        ({"train_layers": "atention"}, "train_layers is 'atention'; allowed: all, blocks, attention, feed_forward"),
        ({"learning_rate_schedule": "linear"}, "learning_rate_schedule is 'linear'"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
        # numbers
        ({"learning_rate": "1e-4"}, r"learning_rate is '1e-4'; it must be a number .*write 1.0e-4"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001; it must be a number of at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"steps": -1}, "steps .*is -1"),
        ({"steps": 0}, "steps of method fbqat is 0; .* at least 1"),
        ({"seed": 2**40}, "seed is .*; it must be a whole number from 0 to"),
        ({"evaluation": {"images": 0}}, "evaluation.images is 0"),
        ({"calibration": {"samples": "all"}}, "calibration.samples is 'all'"),
        (
            {"calibration": {"rule": "minmax"}},
            "calibration.rule is 'minmax'; allowed: mean_3sigma, min_max, percentile",
        ),
        ({"calibration": {"percentile": 101}}, "calibration.percentile is 101"),
        ({"rounding": {"ewgs": "0.1"}}, "rounding.ewgs is '0.1'"),
        ({"rounding": {"slope": True}}, r"unknown key in rounding: 'slope'.*Allowed: ewgs"),
        ({"rounding": {"ewgs": -1}}, "rounding.ewgs is -1"),
        ({"generation": {"height": None}}, "generation.height is None"),
        # other types
        ({"schedule": "paper"}, "schedule is 'paper'; it must be a mapping"),
        ({"quantization": None}, "quantization is None; it must be a mapping"),
        ({"quantization": {4: 4}}, "quantization is {4: 4}; it must be a mapping of keys"),
        ({"teacher": 5}, "teacher is 5; it must be text"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing is 'yes'; it must be true or false"),
        ({"dataset": {"split": "train"}}, "dataset is .*needs a path"),
        # bit schedules
        ({"schedule": {"stages": [[1.5, 1], [4, 1]]}}, "bit width is 1.5; it must be a number from 2 to 16"),
        ({"schedule": {"stages": [[float("nan"), 1], [4, 1]]}}, "bit width is nan"),
        ({"schedule": {"stages": [[8, 1], [5, 1]]}}, "ends at 5 bits; what is stored has 4"),
        ({"schedule": {"preset": "paper", "bits": 3}}, "ends at 3 bits; what is stored has 4"),
        (
            {"quantization": {"weight_bits": 3}, "schedule": {"stages": [[4, 1]]}},
            "ends at 4 bits; what is stored has 3",
        ),
        ({"schedule": {"stages": [8, 4]}}, r"schedule.stages is \[8, 4\]; it must be a list of \[bit width"),
        ({"schedule": {"stages": [["8", 1], [4, 1]]}}, "schedule.stages is"),
        ({"schedule": {"stages": [[8, 0], [4, 1]]}}, "share above 0"),
        ({"schedule": {"softness": "0.1"}}, "schedule.softness is '0.1'"),
        ({"schedule": {"softness": 2}}, "softness is 2"),
        ({"schedule": {"soft_until": 1}}, "soft_until is 1"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", {**MINIMAL, **changes}))


def test_training_free_method_takes_no_steps() -> None:
    with pytest.raises(ValueError, match=r"steps of method ptq-mse is 9; .* from 0 to 0"):
        Recipe(**MINIMAL, method="ptq-mse", steps=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nfamily: sana", "recipe bad.yaml lacks teacher"),
        ("- name", "recipe bad.yaml is not a mapping"),
        ("", "recipe bad.yaml is not a mapping"),
        ("name: [x", "bad.yaml is not YAML"),
        ("1: 2", "unknown key in recipe bad.yaml: '1'"),
    ],
)
def test_not_a_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("source", ["sana-huge", "missing/sana-tiny.yaml", "../sana-tiny"])
def test_unknown_recipe_lists_what_ships(source: str) -> None:
    """A mistyped path never means the shipped recipe of that name."""
    with pytest.raises(FileNotFoundError, match=r"no recipe file .*; shipped: .*sana-tiny"):
        load_recipe(source)


def test_every_field_is_saved(tmp_path: Path) -> None:
    recipe = Recipe(**MINIMAL, attribution="Ünïcode – ok", learning_rate=1e-5)
    recipe.save(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == asdict(recipe)


@pytest.mark.parametrize(
    ("method", "start", "compensated"),
    [("fbqat", "", True), ("fbqat", "nearest", False), ("vqat", "", False), ("vqat", "compensated", True)],
)
def test_start_is_the_methods_unless_the_recipe_says_otherwise(method: str, start: str, compensated: bool) -> None:
    assert Recipe(**{**MINIMAL, "method": method, "start": start}).starts_compensated is compensated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "best"}, "start is 'best'"),
        ({"loss_weighting": "snr"}, "loss_weighting is 'snr'"),
        ({"method": "fbqat-paper", "start": "compensated"}, "start 'compensated' is for one width"),
        ({"compensation": {"margin": 0.7}}, r"compensation.margin is 0.7; it must be a number from 0 to 0.5"),
        ({"compensation": {"margin": 0.04}}, r"margin is 0.04 and softness 0.1; give a margin of at least .* 0.05"),
        ({"compensation": {"samples": 0}}, "compensation.samples is 0"),
        ({"compensation": {"sample": 5}}, r"'sample' \(did you mean 'samples'\?\)"),
    ],
)
def test_wrong_start_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**{**MINIMAL, **changes})
