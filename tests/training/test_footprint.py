"""The memory of a step, computed without numbers, is that of the real loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fbqat_hub.families import FAMILIES, get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training import footprint
from fbqat_hub.training.bases import configs_of
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.footprint import Storages, step_memory
from fbqat_hub.training.loop import accelerator_of, distill
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.student import narrow_teacher, prepare_student, tensors_of
from tests.conftest import call_of


@pytest.mark.usefixtures("other_precision")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_real_loop_takes_what_was_computed(
    precision: str, checkpointing: bool, recipe_fields: dict[str, Any], tmp_path: Path
) -> None:
    """Storages of the real loop's steps, counted in the same way, to 5%: gradients, moments and activations."""
    changes = {"mixed_precision": precision, "gradient_checkpointing": checkpointing, "batch_size": 16, "steps": 3}
    recipe = Recipe(**recipe_fields | changes | {"initialization": "nearest", "save_every": 0})
    computed = step_memory(recipe, configs_of(recipe.teacher))
    pipeline = load_pipeline(recipe.teacher)
    splits = cached_splits(recipe, pipeline)
    draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.generation, 0)
    teacher = pipeline.transformer
    student = prepare_student(recipe, teacher, splits["train"], draws)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert computed.trained == sum(parameter.numel() for parameter in trained)
    assert computed.student == sum(parameter.nbytes for parameter in trained)
    narrow_teacher(recipe, teacher, student)
    there = {*tensors_of(teacher), *tensors_of(student)}
    assert computed.teacher + computed.student + computed.frozen == sum(value.nbytes for value in there)
    with Storages() as real:
        for value in (*teacher.state_dict().values(), *student.state_dict().values()):
            real._see(value.untyped_storage())  # or a view of it would count as new
        before = real.bytes
        distill(recipe, student, teacher, splits, draws, tmp_path, accelerator_of(recipe), False, False)
    assert real.peak - before == pytest.approx(computed.gradients + computed.optimizer + computed.activations, rel=0.05)


def test_a_step_is_traced_once(recipe_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for moments in 8 bits, nor for a part of a batch that is as large as another one's."""
    recipe = Recipe(**recipe_fields | {"micro_batch_size": 2, "batch_size": 8})
    eight = replace(recipe, optimizer=replace(recipe.optimizer, moment_bits=8))
    asked = [(recipe, None), (eight, None), (replace(recipe, batch_size=16), None), (recipe, 1), (eight, 1)]
    asked += [(replace(recipe, train_layers="attention"), None), (replace(recipe, micro_batch_size=None), 1)]
    traced: list[int] = []
    plain = footprint._traced
    monkeypatch.setattr(footprint, "_traced", lambda *given: traced.append(given[2]) or plain(*given))
    monkeypatch.setattr(footprint, "_TRACED", {})
    configs = configs_of(recipe.teacher)
    found = [step_memory(each, configs, size) for each, size in asked]
    assert traced == [2, 1, 2]
    for (each, size), own in zip(asked, found, strict=True):
        monkeypatch.setattr(footprint, "_TRACED", {})
        assert step_memory(each, configs, size) == own


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_footprint(name: str, teacher_of: Any, recipe_fields: dict[str, Any]) -> None:
    folder = teacher_of(name)
    call = call_of(name, load_pipeline(folder, meta=True))
    recipe = Recipe(**recipe_fields | {"family": name, "teacher": str(folder), "generation": call})
    configs = configs_of(str(folder))
    four, one = step_memory(recipe, configs), step_memory(recipe, configs, 1)
    assert four.trained == one.trained > 0
    # two moments in float32; Qwen-Image's last block makes a text that nobody reads, which has no gradient
    assert (0.85 if name == "qwen-image" else 0.99) < four.optimizer / (8 * four.trained) < 1.01
    assert four.activations > one.activations
    fewer = step_memory(replace(recipe, train_layers="attention"), configs)
    assert fewer.trained < four.trained
    assert fewer.student + fewer.frozen == four.student + four.frozen
