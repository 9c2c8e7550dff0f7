"""Recipes: resolved when they are loaded, the same for every later version, and mistakes are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fbqat_hub.families import FAMILIES
from fbqat_hub.generation import changed_call
from fbqat_hub.quantization import BitSchedule
from fbqat_hub.training import dataset, method
from fbqat_hub.training.call import check_call
from fbqat_hub.training.checkpoint import is_of_recipe
from fbqat_hub.training.distill import is_finished
from fbqat_hub.training.method import FBQAT, METHODS
from fbqat_hub.training.migration import RATES_THEN
from fbqat_hub.training.prompts import PROMPT_SETS
from fbqat_hub.training.recipe import RECIPE_VERSION, RECIPES, Recipe, load_recipe, recipe_of_run
from tests.conftest import write_recipe

MINIMAL: dict[str, Any] = {"name": "x", "family": "sana", "teacher": "owner/name"}
# What fbqat_hub 0.1 saved of the tiny Sana: `method: fbqat`, `quantization: {}`, `start: ''`.
OLD = Path(__file__).with_name("recipe-0.1.yaml")


def changed_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version, whose default method starts at the nearest codes, trains all and has no loss weights."""
    other = replace(FBQAT, initialization="nearest", loss_weighting="none", train_layers="all")
    monkeypatch.setitem(method.METHODS, "fbqat", other)


# what a recipe means


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_loads_by_name_and_by_path(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe == load_recipe(path) == load_recipe(path.name)
    assert recipe.family in FAMILIES
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_saved_recipe_means_the_same_whatever_the_methods_of_its_reader(tmp_path: Path, monkeypatch) -> None:
    recipe = Recipe(**MINIMAL)
    recipe.save(tmp_path / "recipe.yaml")
    changed_default(monkeypatch)
    assert Recipe(**MINIMAL) != recipe
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_every_value_that_runs_is_written_out(tmp_path: Path) -> None:
    Recipe(**MINIMAL, learning_rate=1e-5, prompts=["Ünïcode – ok"]).save(tmp_path / "recipe.yaml")
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert next(iter(saved)) == "recipe_version"
    assert saved["quantization"]["weight_clip"] == "learned"
    assert saved["quantization"]["module_overrides"] == {"proj_out": {"bits": 16}}
    assert saved["schedule"] == {"stages": [[4, 1]]}
    assert (saved["initialization"], saved["loss_weighting"], saved["train_layers"]) == ("gptq", "sampler", "blocks")
    assert saved["gptq"] == {"samples": 100, "damping": 0.01, "margin": 0.05}
    assert saved["optimizer"]["learning_rate_unit"] == "relative"
    assert saved["optimizer"]["clip_learning_rate"] == 0.2
    assert saved["generation"] == {"height": 512, "width": 512, "use_resolution_binning": False}
    assert (saved["learning_rate"], saved["prompts"]) == (1e-5, ["Ünïcode – ok"])


@pytest.mark.parametrize("version", [RECIPE_VERSION + 1, 99])
def test_a_newer_version_is_refused_by_its_number(version: int, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", {**Recipe(**MINIMAL).to_dict(), "recipe_version": version, "new": 1})
    with pytest.raises(ValueError, match=rf"recipe_version {version}; .* up to {RECIPE_VERSION}. Update with: pip"):
        load_recipe(path)


@pytest.mark.parametrize("version", [0, True, "1", None, 1.0])
def test_a_version_that_is_none_is_refused(version: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", {**Recipe(**MINIMAL).to_dict(), "recipe_version": version})
    with pytest.raises(ValueError, match=r"recipe_version is .*; it must be a whole number"):
        load_recipe(path)


@pytest.mark.parametrize("missing", ["loss_weighting", "schedule", "gptq.margin", "quantization.weight_clip"])
def test_with_a_version_a_recipe_is_complete(missing: str, tmp_path: Path) -> None:
    """Else what is missing would be the reader's default again."""
    data = Recipe(**MINIMAL).to_dict()
    section, _, key = missing.rpartition(".")
    del (data[section] if section else data)[key]
    with pytest.raises(ValueError, match=rf"lacks {missing}, and with a recipe_version .* take recipe_version out"):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", data))
    del data["recipe_version"]
    assert load_recipe(write_recipe(tmp_path / "recipe.yaml", data)) == Recipe(**MINIMAL)


def test_a_recipe_of_the_version_before_there_were_versions() -> None:
    """Its default had the soft staircase, which is gone: a run of it is read, and not trained."""
    defaults: Any = {"quantization": {"average_bits": None}, "calibration": {"rule": "mean_3sigma"}}
    defaults |= {"learning_rate": 1e-4, **RATES_THEN}
    assert yaml.safe_load(OLD.read_text())["start"] == ""
    assert recipe_of_run(OLD) == load_recipe("sana-tiny", **defaults)
    with pytest.raises(ValueError, match=r"schedule.softness is 0\.1; it was removed .* use fbqat_hub 0\.1"):
        load_recipe(OLD)


@pytest.mark.parametrize("softness", [0.0, 0.1])
def test_a_saved_recipe_that_names_the_staircase(softness: float, tmp_path: Path) -> None:
    """Off, it is as if it did not; on, the run is read, and not trained."""
    recipe = Recipe(**MINIMAL)
    saved = recipe.to_dict()
    saved["schedule"] |= {"softness": softness, "soft_until": 9 * softness}
    path = write_recipe(tmp_path / "recipe.yaml", saved)
    assert recipe_of_run(path) == recipe
    if softness:
        with pytest.raises(ValueError, match=r"schedule.softness is 0\.1; it was removed .* use fbqat_hub 0\.1"):
            load_recipe(path)
    else:
        assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"start": "nearest"}, {"initialization": "nearest"}),
        ({"start": "compensated", "method": "vqat"}, {"initialization": "gptq", "method": "vqat"}),
        ({"compensation": {"samples": 5}}, {"gptq": {"samples": 5}}),
        (
            {"method": "vqat", "schedule": {"preset": "simple", "bits": 4, "ramp": "steps"}},
            {"method": "vqat", "schedule": {"stages": "simple"}},
        ),
        ({"rounding": {"ewgs": 0.1, "slope": False, "dampening": 0.0}}, {"optimizer": {"ewgs": 0.1}}),
        ({"warmup_steps": 3, "max_grad_norm": 1.0}, {"optimizer": {"warmup_steps": 3, "max_grad_norm": 1.0}}),
        (
            {"quantization": {"weight_granularity": "per_group", "group_size": 32, "weight_narrow": False}},
            {"quantization": {"group_size": 32}},
        ),
        ({"license": "mit", "attribution": "me"}, {}),
    ],
)
def test_old_names_are_todays(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    """And rates are those of all layers, as they were then."""
    new["optimizer"] = {**RATES_THEN["optimizer"], **new.get("optimizer", {})}
    path = write_recipe(tmp_path / "old.yaml", {**MINIMAL, **old})
    assert load_recipe(path) == Recipe(**MINIMAL, **new, blockwise=RATES_THEN["blockwise"])


def test_a_saved_recipe_from_before_rates_had_a_unit(tmp_path: Path) -> None:
    """Its rates keep their meaning; and where a share is meant, the rates of then are refused."""
    saved = Recipe(**MINIMAL, learning_rate=1e-7, **RATES_THEN).to_dict()
    del saved["optimizer"]["learning_rate_unit"]
    path = write_recipe(tmp_path / "recipe.yaml", saved)
    assert load_recipe(path) == recipe_of_run(path) == Recipe(**MINIMAL, learning_rate=1e-7, **RATES_THEN)
    for changes in ({"learning_rate": 1e-7}, {"blockwise": {"learning_rate": 1e-7}}):
        with pytest.raises(ValueError, match=r"learning_rate is 1e-07, and it is relative .*_unit=absolute"):
            Recipe(**MINIMAL, **changes)
    Recipe(**MINIMAL, learning_rate=0.0)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"rounding": {"slope": True}}, "rounding.slope is True; it was removed"),
        ({"rounding": {"dampening": 1e-3}}, "rounding.dampening is 0.001; it was removed"),
        ({"schedule": {"preset": "simple", "ramp": "linear"}}, "schedule.ramp is 'linear'; it was removed"),
        ({"quantization": {"weight_narrow": True}}, "quantization.weight_narrow is True; it was removed"),
        ({"quantization": {"weight_granularity": "per_tensor"}}, "weight_granularity is 'per_tensor'; it was removed"),
        ({"start": "best"}, "unknown key .*'start'"),
    ],
)
def test_what_was_removed_is_refused_where_it_was_on(old: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(tmp_path / "old.yaml", {**MINIMAL, **old}))


def test_a_run_with_the_staircase_is_not_resumed_here(tmp_path: Path) -> None:
    recipe = Recipe(**MINIMAL)
    saved = recipe.to_dict()
    saved["schedule"] |= {"softness": 0.1, "soft_until": 0.9}
    write_recipe(tmp_path / "recipe.yaml", saved)
    with pytest.raises(ValueError, match=r"softness is 0\.1; .* To continue such a run, use fbqat_hub 0\.1"):
        is_finished(recipe, tmp_path, resume=True)
    checkpoint = tmp_path / "checkpoints"
    checkpoint.mkdir()
    for softness in (0.0, 0.1):
        saved["schedule"]["softness"] = softness
        saved["schedule"]["soft_until"] = 9 * softness
        write_recipe(checkpoint / "recipe.yaml", saved)
        if softness:
            with pytest.raises(ValueError, match="softness is"):
                is_of_recipe(checkpoint, yaml.safe_dump(recipe.to_dict()))
        else:
            is_of_recipe(checkpoint, yaml.safe_dump(recipe.to_dict()))


# methods


def test_the_default_method_is_the_first_and_whole() -> None:
    assert next(iter(METHODS)) == Recipe(**MINIMAL).method == "fbqat"
    recipe = Recipe(**MINIMAL)
    for name, value in FBQAT.fields().items():
        if name not in ("schedule", "quantization"):  # whose names are resolved
            assert getattr(recipe, name) == value, name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_changed_on_the_command_line_brings_its_own_values(name: str, tmp_path: Path) -> None:
    """From a recipe that ships, and from what a run of another method saved."""
    uniform = {"average_bits": None}
    recipe = load_recipe("sana-tiny", method=name, quantization=uniform)
    assert (recipe.steps == 0) == name.startswith("ptq")
    clip = {"ptq-mse": "mse", "ptq-gptq": "mse", "lsq-qat": "learned", "fbqat": "learned"}.get(name, "max_abs")
    assert recipe.config().weight_clip == clip
    widths = {"integer": "integer", "simple": "simple", "fbqat-paper": "paper"}
    assert recipe.bit_schedule().stages == BitSchedule.preset(widths.get(name, "constant")).stages
    assert (recipe.initialization == "gptq") == (name in ("fbqat", "ptq-gptq"))

    other = "integer" if name != "integer" else "vqat"
    load_recipe("sana-tiny", method=other, quantization=uniform).save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml", method=name) == recipe


def test_recipe_wins_over_method_and_family() -> None:
    recipe = Recipe(
        **MINIMAL,
        method="fbqat-paper",
        quantization={"weight_clip": "mse", "module_overrides": {}},
        schedule={"stages": [[8, 1], [5, 1], [4, 3]]},
        optimizer={"ewgs": 0.2},
    )
    assert recipe.config().weight_clip == "mse"
    assert recipe.config().module_overrides == {}
    assert Recipe(**MINIMAL).config().module_overrides == {"proj_out": {"bits": 16}}
    assert recipe.bit_schedule().bit_width(0.25) == 5
    assert recipe.optimizer.ewgs == 0.2
    assert recipe.optimizer.warmup_steps == 0


def test_a_named_schedule_ends_at_the_stored_width() -> None:
    recipe = Recipe(**MINIMAL, method="fbqat-paper", quantization={"weight_bits": 3})
    assert recipe.bit_schedule().stages == BitSchedule.preset("paper", 3).stages


def test_group_size_is_all_there_is_to_say_of_groups() -> None:
    config = Recipe(**MINIMAL, quantization={"group_size": 32}).config()
    assert (config.weight_granularity, config.group_size) == ("per_group", 32)
    assert Recipe(**MINIMAL).config().weight_granularity == "per_channel"


def test_changes_of_a_section_leave_the_rest_of_it(tmp_path: Path) -> None:
    fields = {**MINIMAL, "optimizer": {"ewgs": 0.05, "warmup_steps": 5}, "generation": {"height": 64, "eta": 0.5}}
    path = write_recipe(tmp_path / "recipe.yaml", fields)
    recipe = load_recipe(path, optimizer={"warmup_steps": 6}, generation={"width": 128}, dataset={"path": "ye-pop"})
    assert (recipe.optimizer.ewgs, recipe.optimizer.warmup_steps) == (0.05, 6)
    assert (recipe.size, recipe.generation["eta"]) == ((64, 128), 0.5)
    assert recipe.dataset == {"path": "ye-pop"}


def test_changes_of_a_data_set_leave_the_rest_of_it(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", {**MINIMAL, "dataset": {"path": "ye-pop", "count": 9000}})
    assert load_recipe(path, dataset={"count": 8000}).dataset == {"path": "ye-pop", "count": 8000}
    assert load_recipe(path, dataset={"skip": 0.5}).dataset == {"path": "ye-pop", "count": 9000, "skip": 0.5}
    assert load_recipe(path, dataset={"path": "openmoji"}).dataset == {"path": "openmoji"}
    assert load_recipe(path, dataset={"prompts": "a.txt", "seeds": 2}).dataset == {"prompts": "a.txt", "seeds": 2}


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"schedule": {"stages": [[8, 1], [4, 1]]}, "initialization": "nearest"}, 2),
        ({"method": "fbqat-paper"}, 2),
        ({"schedule": {"stages": [[8, 1], [6, 3], [4, 0.25]]}, "initialization": "nearest"}, 17),
    ],
)
@pytest.mark.parametrize("training", ["end_to_end", "blockwise"])
def test_the_stored_width_has_a_step(changes: dict[str, Any], least: int, training: str) -> None:
    """In shorter runs of several widths others may have none: a demo is one."""
    name = "blockwise.steps" if training == "blockwise" else "steps"

    def recipe(steps: int) -> Recipe:
        own: dict[str, Any] = {"blockwise": {"steps": steps}} if training == "blockwise" else {"steps": steps}
        return Recipe(**MINIMAL, **changes, **own, training=training)

    schedule = recipe(least).bit_schedule()
    assert schedule.bit_width((least - 1) / least) == 4
    assert schedule.bit_width((least - 2) / (least - 1)) > 4
    with pytest.raises(ValueError, match=rf"ends with \[4, .* {name} is {least - 1}, .* at least {least} steps"):
        recipe(least - 1)


def test_the_size_of_pictures_is_said_once() -> None:
    """Of a side that is left out the other's; the pipeline is not left to draw at a size of its own."""
    assert Recipe(**MINIMAL).size == (512, 512)
    assert Recipe(**MINIMAL, generation={"height": 96}).size == (96, 96)
    assert Recipe(**MINIMAL, generation={"width": 64}).size == (64, 64)
    assert Recipe(**MINIMAL, generation={"height": 64, "width": 128}).size == (64, 128)
    assert "use_resolution_binning" not in Recipe(**{**MINIMAL, "family": "flux"}).generation


@pytest.mark.parametrize("name", ["sana-600m", "pixart-sigma", "sd3.5-medium", "flux-schnell"])
def test_recipes_of_real_models_have_the_papers_budget(name: str) -> None:
    """25 epochs of 45 600 pictures; as published, at the paper's widths: 14 of them at 4 bits."""
    recipe = load_recipe(name, method="fbqat-paper", quantization={"average_bits": None})
    epoch = 45_600 // recipe.batch_size
    assert recipe.steps == 25 * epoch
    at = [recipe.bit_schedule().bit_width((number * epoch + 1) / recipe.steps) for number in range(25)]
    assert at == [8, 7, 6, 5.5, 5, *[4.75] * 2, *[4.5] * 2, *[4.25] * 2, *[4] * 14]
    assert (recipe.train_layers, recipe.optimizer.learning_rate_schedule) == ("all", "constant")


# mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # unknown keys name the nearest
        ({"learning_rat": 1.0}, r"'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ({"schedule": {"stage": "paper"}}, r"schedule: 'stage' \(did you mean 'stages'\?\)"),
        ({"schedule": {"stages": "papr"}}, "schedule.stages is 'papr'; it must be constant, paper, integer"),
        ({"quantization": {"weight_clp": "mse"}}, r"'weight_clp' \(did you mean 'weight_clip'\?\)"),
        ({"optimizer": {"egws": 0.1}}, r"optimizer: 'egws' \(did you mean 'ewgs'\?\)"),
        ({"evaluation": {"image": 4}}, r"evaluation: 'image' \(did you mean 'images'\?\)"),
        ({"calibration": {"sample": 4}}, r"calibration: 'sample' \(did you mean 'samples'\?\)"),
        ({"gptq": {"sample": 5}}, r"gptq: 'sample' \(did you mean 'samples'\?\)"),
        ({"generation": {"heigth": 64}}, r"generation .*SanaPipeline.*: 'heigth' \(did you mean 'height'\?\)"),
        ({"dataset": {"path": "openmoji", "group": []}}, r"dataset \(openmoji\): 'group' \(did you mean 'groups'\?\)"),
        ({"dataset": {"path": "imagefolder", "data_dir": "d", "foo": 1}}, r"dataset \(imagefolder\): 'foo'"),
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
        (
            {"method": "fbqat-paper", "keep_stages": [5.5]},
            r"keep_stages is \[5.5\]; it must be a list of whole",
        ),
        ({"method": "fbqat-paper", "keep_stages": 6}, "keep_stages is 6; it must be a list of whole numbers"),
        (
            {"initialization": "nearest", "steps": 400, "schedule": {"stages": [[8, 1], [4, 1e-9]]}},
            r"ends with \[4, 1e-09\], and steps is 400, .* at least 1,000,000,001 steps",
        ),
        (
            {"initialization": "nearest", "schedule": {"stages": [[8, 1e308], [4, 1e308]]}},
            "sum of these is infinite",
        ),
        # choices
        ({"method": "fbqta"}, r"method is 'fbqta' \(did you mean 'fbqat'\?\); allowed: .*fbqat-paper"),
        ({"method": ["fbqat"]}, r"method is \['fbqat'\]"),
        ({"family": "dalle"}, "family is 'dalle'; supported: sana"),
        ({"train_layers": "atention"}, "train_layers is 'atention' .* allowed: all, blocks, attention, feed_forward"),
        (
            {"optimizer": {"learning_rate_schedule": "linear"}},
            "rate_schedule is 'linear'; it must be cosine or",
        ),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; it must be 'no', bf16 or fp16"),
        ({"initialization": "best"}, "initialization is 'best'; it must be nearest or gptq"),
        ({"loss_weighting": "snr"}, "loss_weighting is 'snr'; it must be none or sampler"),
        # numbers
        ({"learning_rate": "1e-4"}, r"learning_rate is '1e-4'; it must be a number .*write 1.0e-4"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number of at least 0.$"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001; it must be a number of at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": "8"}, r"batch_size is '8'; .* \(without quotes\)"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 0}, "steps of method fbqat is 0; it must be at least 1"),
        ({"method": "ptq-mse", "steps": 9}, "steps of method ptq-mse is 9; it must be 0"),
        ({"seed": 2**40}, "seed is .*; it must be a whole number from 0 to"),
        ({"evaluation": {"images": 0}}, "evaluation.images is 0"),
        ({"calibration": {"samples": "all"}}, "calibration.samples is 'all'"),
        ({"calibration": {"rule": "minmax"}}, "calibration.rule is 'minmax'; it must be mean_3sigma, min_max or perc"),
        ({"calibration": {"percentile": 101}}, "calibration.percentile is 101"),
        ({"optimizer": {"ewgs": "0.1"}}, "optimizer.ewgs is '0.1'"),
        ({"gptq": {"margin": 0.7}}, r"gptq.margin is 0.7; it must be a number from 0 to 0.5"),
        ({"gptq": {"samples": 0}}, "gptq.samples is 0"),
        ({"gptq": {"damping": 0}}, "gptq.damping is 0; it must be a number above 0, at most 1"),
        ({"gptq": {"damping": 1e39}}, "gptq.damping is 1e.39; it must be a number above 0, at most 1"),
        ({"gptq": {"samples": 10**30}}, "gptq.samples is 1000000.*; it must be a whole number of at least 1, at most"),
        ({"steps": 10**29}, "steps is 1000000.*; it must be a whole number of at least 0, at most 10000000"),
        ({"batch_size": 10**9}, "batch_size is 1000000000; it must be a whole number of at least 1, at most 10000000"),
        ({"blockwise": {"samples": 10**400}}, "blockwise.samples is 1000000"),
        ({"calibration": {"percentile": 0}}, "calibration.percentile is 0; it must be a number above 0, at most 100"),
        ({"lora_scale": 0.5}, "lora_scale is 0.5, and there is no lora; give the adapter too"),
        (
            {"quantization": {"activation_bits": 32, "activation_range": "static"}},
            "activation_range is static, and activation_bits 32 leaves activations in float; leave the range out",
        ),
        ({"quantization": {"group_size": 31}}, "group_size is 31; it must be an even number of at least 2, or null"),
        ({"quantization": {"weight_bits": 9}}, "weight_bits is 9; it must be a whole number from 3 to 8"),
        # the pipeline's call
        ({"generation": {"height": None}}, "generation.height is None; it must be a multiple of 32"),
        ({"generation": {"height": 60}}, "generation.height is 60; it must be a multiple of 32 from 32 to 8192"),
        ({"generation": {"width": -64}}, "generation.width is -64"),
        ({"generation": {"num_inference_steps": 0}}, "num_inference_steps is 0; it must be a whole number from 1"),
        ({"generation": {"num_inference_steps": 1.5}}, "num_inference_steps is 1.5"),
        ({"generation": {"guidance_scale": "high"}}, "guidance_scale is 'high'; it must be a number"),
        ({"generation": {"num_images_per_prompt": 2}}, "num_images_per_prompt must be 1"),
        ({"generation": {"prompt": "red"}}, "'prompt'"),
        # other types
        ({"schedule": "paper"}, "schedule is 'paper'; it must be a mapping"),
        ({"quantization": None}, "quantization is None; it must be a mapping"),
        ({"quantization": {4: 4}}, "quantization: '4'"),
        ({"teacher": 5}, "teacher is 5; it must be text"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing is 'yes'; it must be true or false"),
        ({"prompts": ["red", " "]}, r"prompts is \['red', ' '\]; it must be a list of texts"),
        # data
        ({"dataset": {"split": "train"}}, "dataset is .*needs a path"),
        ({"dataset": {"path": "openmoji", "groups": "Flags"}}, "dataset.groups is 'Flags'; it must be a list of texts"),
        ({"dataset": {"path": "ye-pop", "count": 0}}, "dataset.count is 0"),
        ({"dataset": {"prompts": "a.txt", "seeds": 10**30}}, "dataset.seeds is 1000000.* from 1 to 10000"),
        ({"dataset": {"path": "a/b", "caption_column": 3}}, "dataset.caption_column is 3; it must be text"),
        ({"dataset": {"path": "a/b", "data_files": [3]}}, r"dataset.data_files is \[3\]"),
        # bit schedules, and where training starts
        ({"schedule": {"stages": [[1.5, 1], [4, 1]]}}, "bit width from 2 to 16"),
        ({"schedule": {"stages": [[float("nan"), 1], [4, 1]]}}, r"stages is \[\[nan, 1\]"),
        ({"schedule": {"stages": [[8, 1], [5, 1]]}}, "ends at 5 bits; what is stored has 4"),
        (
            {"quantization": {"weight_bits": 3}, "schedule": {"stages": [[4, 1]]}},
            "ends at 4 bits; what is stored has 3",
        ),
        ({"schedule": {"stages": [8, 4]}}, r"schedule.stages is \[8, 4\]; .* list of \[bit width"),
        ({"schedule": {"stages": [["8", 1], [4, 1]]}}, "schedule.stages is"),
        ({"schedule": {"stages": [[8, 0], [4, 1]]}}, "share of training above 0"),
        ({"method": "fbqat-paper", "initialization": "gptq"}, "initialization gptq is for one bit width"),
    ],
)
def test_mistakes_are_named_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(write_recipe(tmp_path / "recipe.yaml", {**MINIMAL, **changes}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_multiples_of_what_the_family_needs(family: str) -> None:
    good, multiple = FAMILIES[family].size_multiple, FAMILIES[family].size_multiple
    assert Recipe(**{**MINIMAL, "family": family}, generation={"height": good, "width": 3 * good}).size == (
        good,
        3 * good,
    )
    with pytest.raises(
        ValueError, match=f"width is {good + 8}; it must be a multiple of {multiple} from {multiple} to"
    ):
        Recipe(**{**MINIMAL, "family": family}, generation={"height": good, "width": good + 8})


def test_what_follows_from_a_call_is_written_out_or_refused() -> None:
    """Kontext's call scales every picture to an area; Sana-Sprint's has a middle timestep of two steps only."""
    kontext, sprint = ({**MINIMAL, "family": family} for family in ("flux-kontext", "sana-sprint"))
    assert Recipe(**kontext, generation={"height": 64, "width": 32}).generation["max_area"] == 64 * 32
    assert "intermediate_timesteps" not in Recipe(**sprint, evaluation={"inference_steps": 2}).generation
    assert Recipe(**sprint, generation={"num_inference_steps": 4}).generation["intermediate_timesteps"] is None
    for fields, generation, message in (
        (
            kontext,
            {"height": 64, "width": 32, "max_area": 4096},
            "max_area is 4096; with the other .* must be 2048, or",
        ),
        (
            sprint,
            {"num_inference_steps": 4, "intermediate_timesteps": 1.3},
            "timesteps is 1.3; with the .* must be null",
        ),
        (sprint, {"intermediate_timesteps": 1.3}, "is 1.3; with evaluation.inference_steps 20 it must be null, or be"),
    ):
        with pytest.raises(ValueError, match=f"recipe: generation.*{message}"):
            Recipe(**fields, generation=generation)


def test_changes_of_a_call_take_with_them_what_follows() -> None:
    kontext = {"height": 64, "width": 64, "max_area": 4096}
    assert changed_call("FluxKontextPipeline", kontext, {"width": 32}) == {"height": 64, "width": 32, "max_area": 2048}
    assert changed_call("FluxKontextPipeline", kontext, {"max_area": 1024})["max_area"] == 1024
    four = changed_call("SanaSprintPipeline", {"num_inference_steps": 2}, {"num_inference_steps": 4})
    assert four == {"num_inference_steps": 4, "intermediate_timesteps": None}
    assert changed_call("SanaSprintPipeline", four, {"num_inference_steps": 2}) == {"num_inference_steps": 2}
    assert changed_call("StableDiffusionPipeline", {"height": 8}, {"width": 8}) == {"height": 8, "width": 8}


def test_a_call_is_checked_by_the_class_of_the_pipeline() -> None:
    check_call("FluxPipeline", {"true_cfg_scale": 2, "negative_prompt": "", "sigmas": [1.0, 0.5], "height": 32})
    check_call("SanaPipeline", {"complex_human_instruction": None, "clean_caption": False, "eta": 1})
    for name, arguments, message in (
        ("SanaPipeline", {"true_cfg_scale": 2}, "unknown key in the call of SanaPipeline: 'true_cfg_scale'"),
        ("SanaPipeline", {"generator": 3}, "'generator'"),
        ("SanaPipeline", {"clean_caption": 1}, "^clean_caption is 1; it must be true or false"),
        ("SanaPipeline", {"negative_prompt": None}, "^negative_prompt is None; it must be text"),
        ("FluxPipeline", {"sigmas": ["a"]}, r"^sigmas is \['a'\]; it must be a list of numbers"),
        ("FluxPipeline", {"sigmas": []}, r"^sigmas is \[\]; it must be a list of numbers of at least 0, one or more"),
        ("SanaPipeline", {"timesteps": [999, -1]}, r"^timesteps is \[999, -1\]; it must be a list of numbers"),
        ("FluxPipeline", {"guidance_scale": float("inf")}, "^guidance_scale is inf; it must be a number"),
        ("FluxPipeline", {"max_sequence_length": 513}, "^max_sequence_length is 513; it must be .* from 1 to 512"),
        ("QwenImagePipeline", {"max_sequence_length": 1025}, "^max_sequence_length is 1025; .* from 1 to 1024"),
        ("ZImagePipeline", {"negative_prompt": ["a"]}, r"^negative_prompt is \['a'\]; it must be text, the same for"),
        ("StableDiffusion3Pipeline", {"clip_skip": -1}, "^clip_skip is -1; it must be a whole number of at least 0"),
        (
            "StableDiffusion3Pipeline",
            {"width": 2**20},
            "^width is 1048576; it must be a multiple of 16 from",
        ),
        ("os", {}, "diffusers has no pipeline 'os'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_call(name, arguments)


def test_the_named_data_sets_are_those_of_the_prompts() -> None:
    """The names stand twice, because a recipe is read where no data set can be loaded."""
    assert set(dataset.NAMED) == set(PROMPT_SETS)


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
