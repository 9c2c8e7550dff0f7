"""Every family trains: finite losses, only the chosen layers move, static ranges reach every layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from fbqat_hub.evaluation.results import read_records
from fbqat_hub.families import FAMILIES, get_family
from fbqat_hub.hub.card import write_card
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import FakeQuantizedLinear, PackedLayer, named_layers
from fbqat_hub.quantization.convert import matches
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.distill import train
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.evaluate import evaluate
from fbqat_hub.training.generate import generate
from fbqat_hub.training.loop import distill
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.student import narrow_teacher, prepare_student, tensors_of
from tests.conftest import MOST_FAMILIES, call_of, write_recipe

# nothing reads the text's part of what the last block puts out, so the text's queries go nowhere
WITHOUT_EFFECT = {
    "sd3": {"transformer_blocks.1.attn.add_q_proj"},
    "qwen-image": {"transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"},
}


@pytest.fixture
def fields_of(teacher_of: Callable[[str], Path], recipe_fields: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """``fields_of(family)``: a recipe of two steps on its tiny teacher and the squares."""

    def fields(family: str) -> dict[str, Any]:
        teacher = teacher_of(family)
        generation = call_of(family, load_pipeline(teacher))
        changes = {"family": family, "teacher": str(teacher), "generation": generation, "steps": 2, "save_every": 0}
        return {**recipe_fields, **changes}

    return fields


def distilled(recipe: Recipe, output: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """The student after the recipe's steps, its tensors before them, and the log."""
    pipeline = load_pipeline(recipe.teacher)
    splits = cached_splits(recipe, pipeline)
    draws = Draws(FAMILIES[recipe.family], pipeline.scheduler, recipe.generation, recipe.seed)
    student = prepare_student(recipe, pipeline.transformer, splits["train"], draws)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    distill(recipe, student, pipeline.transformer, splits, draws, output, Accelerator(), resume=False, progress=False)
    return student, before, [yaml.safe_load(line) for line in (output / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", MOST_FAMILIES)
def test_a_teacher_in_half_the_memory_predicts_the_same(family: str, fields_of) -> None:
    """To the bit, in bfloat16. What is not quantized is there once, of teacher and student, in float32."""
    recipe = Recipe(**{**fields_of(family), "mixed_precision": "bf16", "initialization": "nearest"})
    pipeline = load_pipeline(recipe.teacher)
    splits, teacher = cached_splits(recipe, pipeline), pipeline.transformer
    draws = Draws(FAMILIES[recipe.family], pipeline.scheduler, recipe.generation, recipe.seed)
    student = prepare_student(recipe, teacher, splits["train"], draws)
    inputs = draws.training(splits["train"], 0, recipe.batch_size)
    predictions, bytes_of_layers = [], []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            predictions.append(draws.predict(teacher, inputs))
        own = {*tensors_of(teacher)} - {*tensors_of(student)}
        bytes_of_layers.append(sum(each.nbytes for each in own))
        narrow_teacher(recipe, teacher, student)
    assert torch.equal(*predictions)
    assert bytes_of_layers[1] == bytes_of_layers[0] / 2
    layers = dict(named_layers(student, FakeQuantizedLinear))
    assert bytes_of_layers[0] == 4 * sum(
        each.numel() for name in layers for each in teacher.get_submodule(name).parameters()
    )
    assert {each.dtype for each in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", MOST_FAMILIES)
def test_chosen_layers_train_and_every_layer_is_calibrated(family: str, fields_of, tmp_path: Path) -> None:
    static = {"quantization": {"activation_range": "static"}, "calibration": {"samples": 3, "rule": "min_max"}}
    recipe = Recipe(**{**fields_of(family), **static, "train_layers": "attention"})
    student, before, log = distilled(recipe, tmp_path)
    assert [line["step"] for line in log] == [1, 2]
    assert all(0 < line["loss"] < float("inf") for line in log)
    changed = {
        name.rpartition(".")[0].removesuffix(".clip")
        for name, value in student.state_dict().items()
        if not torch.equal(value, before[name])
    }
    layers = dict(named_layers(student, FakeQuantizedLinear))
    chosen = {name for name in layers if matches(name, FAMILIES[family].layer_groups["attention"])}
    assert changed == chosen - WITHOUT_EFFECT.get(family, set())
    assert len(layers) > 20
    assert all(0 < before[f"{name}.input_scale"] < float("inf") for name in layers)


@pytest.mark.parametrize("family", MOST_FAMILIES)
def test_loss_weighting_counts_errors_by_what_the_sampler_makes_of_them(family: str, fields_of, tmp_path: Path) -> None:
    fields = {**fields_of(family), "steps": 1, "learning_rate": 0.0}
    logged = {}
    for weighting in ("none", "sampler"):
        recipe = Recipe(**fields, loss_weighting=weighting)
        (tmp_path / weighting).mkdir()
        student, _, log = distilled(recipe, tmp_path / weighting)  # unchanged by a rate of 0
        logged[weighting] = log[0]["loss"]
    assert Recipe(**fields).loss_weighting == "sampler"
    assert Recipe(**fields | {"method": "lsq-qat"}).loss_weighting == "none"

    pipeline = load_pipeline(recipe.teacher)
    draws = Draws(FAMILIES[family], pipeline.scheduler, recipe.generation, recipe.seed)
    inputs = draws.training(cached_splits(recipe, pipeline)["train"], 0, recipe.batch_size)
    with torch.no_grad():
        errors = (draws.predict(student, inputs) - draws.predict(pipeline.transformer, inputs)).square().flatten(1)
    weight = draws.error_weight(inputs)
    assert logged["none"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert (weight is not None) == (family == "pixart-sigma")  # the others are flow matching
    weighted = errors.mean(1) if weight is None else weight * errors.mean(1)
    assert logged["sampler"] == pytest.approx(weighted.mean().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", MOST_FAMILIES)
def test_train_evaluate_card_and_generate(family: str, fields_of, tmp_path: Path) -> None:
    """From a recipe file to the card, with nothing said of the family but its name."""
    fields = {**fields_of(family), "prompts": ["dark red"]}
    fields["evaluation"] = {**fields["evaluation"], "draws": 2}
    run = train(load_recipe(write_recipe(tmp_path / "recipe.yaml", fields)), tmp_path / "run", progress=False)
    evaluate(run, progress=False)
    records = {record.metric: record for record in read_records(run / "results.json")}
    assert {"kd_loss", "fd_teacher", "psnr", "ssim", "bits_per_weight"} <= set(records)
    assert {record.family for record in records.values()} == {family}
    assert records["kd_loss"].value > 0
    assert 10 < records["psnr"].value < 90
    card = write_card(run).read_text()
    assert f"- {family}\n" in card
    assert f"base_model: tiny-{family}\n" in card
    namespace: dict[str, Any] = {}
    code = card.split("```python\n")[1].split("```")[0].replace('from_pretrained("."', f"from_pretrained({str(run)!r}")
    exec(code.replace('"picture.png"', repr(str(tmp_path / "card.png"))), namespace)
    drawn = generate(str(run), ["dark red"], tmp_path / "drawn.png", seed=fields.get("seed", 1234))
    assert (tmp_path / "card.png").read_bytes() == drawn.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_block_by_block(family: str, fields_of, tmp_path: Path) -> None:
    settings = {"samples": 4, "steps": 1, "tuning_steps": 1}
    recipe = Recipe(**{**fields_of(family), "training": "blockwise", "blockwise": settings})
    run = train(recipe, tmp_path / "run", progress=False)
    log = [yaml.safe_load(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    student = load_pipeline(run).transformer
    assert [line.get("block") for line in log] == [*get_family(recipe.family).blocks(student), None]
    assert all(0 < line["loss"] < float("inf") for line in log)
    assert len(dict(named_layers(student, PackedLayer))) > 20
