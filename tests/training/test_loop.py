"""The loop step by step: what is updated, in which precision, and what a checkpoint goes on from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fbqat_hub.quantization import FakeQuantizedLinear, named_layers
from fbqat_hub.training.loop import learning_rate_factor
from fbqat_hub.training.recipe import Recipe


def test_after_step_is_called_when_the_update_is_done(scene_of, tmp_path: Path) -> None:
    scene = scene_of(steps=3)
    student = scene.student()
    layer = next(layer for _, layer in named_layers(student, FakeQuantizedLinear) if layer.weight.requires_grad)
    seen: dict[int, Tensor] = {}
    scene.distill(student, tmp_path, lambda step: seen.update({step: layer.weight.detach().clone()}))
    assert list(seen) == [0, 1, 2]
    assert torch.equal(seen[2], layer.weight)
    assert not torch.equal(seen[1], seen[2])


def test_moments_of_a_clip_are_those_of_its_width(scene_of, tmp_path: Path) -> None:
    """Two steps at each of 8, 6 and 4 bits: Adam counts a clip's steps anew at 6 and 4, a weight's throughout."""
    scene = scene_of(
        method="lsq-qat", steps=6, save_every=0, schedule={"stages": [[8, 1], [6, 1], [4, 1]]}, train_layers="all"
    )
    student = scene.student()
    loop = scene.loop(student, tmp_path)
    loop.start(resume=False)
    layer = next(layer for _, layer in named_layers(student, FakeQuantizedLinear))
    counts, first_moments = [], []
    for step in range(6):
        loop.step(step)
        counts.append(tuple(int(loop.optimizer.state[each]["step"]) for each in (layer.clip.log_clip, layer.weight)))
        first_moments.append(loop.optimizer.state[layer.clip.log_clip]["exp_avg"].clone())
    assert counts == [(1, 1), (2, 2), (1, 3), (2, 4), (1, 5), (2, 6)]
    loop.step(5)
    assert not torch.equal(first_moments[-1], loop.optimizer.state[layer.clip.log_clip]["exp_avg"])
    loop.finish()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_validation_is_in_the_precision_of_training(precision: str, scene_of, tmp_path: Path, other_precision) -> None:
    """The loss of a student that is the teacher is 0, if both compute alike."""
    scene = scene_of(method="vqat", mixed_precision=precision)
    student = copy.deepcopy(scene.teacher).requires_grad_(False)
    student.proj_out.requires_grad_(True)
    loop = scene.loop(student, tmp_path)
    loop.start(resume=False)
    seen: list[torch.dtype] = []
    for model in (student, scene.teacher):
        model.proj_out.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    assert loop.validation_loss() < 1e-12
    assert student.training
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert len(seen) == 2

    loop.finish()
    seen.clear()
    scene.draws.predict(student, next(scene.draws.held_out(scene.splits["train"], 1, 2)))
    assert seen == [torch.float32]


def test_bf16_trains_the_same_model_up_to_its_precision(scene_of, tmp_path: Path, other_precision) -> None:
    """The first loss is that of student and teacher both under autocast, and not that of float32."""
    scene = scene_of(method="vqat", mixed_precision="bf16", steps=1, save_every=0)
    student = scene.student()
    inputs = scene.draws.training(scene.splits["train"], 0, scene.recipe.batch_size)
    with torch.no_grad():
        exact = [scene.draws.predict(model, inputs) for model in (student, scene.teacher)]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [scene.draws.predict(model, inputs).float() for model in (student, scene.teacher)]
    loop = scene.loop(student, tmp_path)
    loop.start(resume=False)
    loss = loop.step(0).loss
    loop.finish()
    assert loss == pytest.approx((rounded[0] - rounded[1]).square().mean().item(), rel=1e-6)
    assert loss != pytest.approx((exact[0] - exact[1]).square().mean().item(), rel=1e-6)
    assert rounded[1].allclose(exact[1], atol=0.02 * float(exact[1].abs().max()))


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"optimizer": {"warmup_steps": 2, "max_grad_norm": 1e3}}]
)
def test_options_that_change_no_number(changes: dict[str, Any], scene_of, tmp_path: Path) -> None:
    """Memory is bought with time; gradients shorter than the limit are left alone."""
    losses = []
    for number, given in enumerate(({}, changes)):
        scene = scene_of(steps=3, save_every=0, **copy.deepcopy(given))
        student = scene.student()
        loop = scene.loop(student, tmp_path / str(number))
        loop.start(resume=False)
        losses.append([loop.step(step).loss for step in range(3)])
        loop.finish()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_gradients_are_clipped_before_the_update(scene_of, tmp_path: Path) -> None:
    """Adam does not see the length of a gradient, but its first moment does."""
    lengths = []
    for limit in (0.0, 1e-6):
        scene = scene_of(method="vqat", steps=1, optimizer={"max_grad_norm": limit, "warmup_steps": 0})
        student = scene.student()
        loop = scene.loop(student, tmp_path / str(limit))
        loop.start(resume=False)
        loop.step(0)
        moments = [state["exp_avg"] for state in loop.optimizer.state.values()]
        lengths.append(sum(float(moment.square().sum()) for moment in moments) ** 0.5)
        loop.finish()
    assert lengths[1] == pytest.approx(0.1 * 1e-6, rel=1e-3)  # 1 - beta_1 of the gradient
    assert lengths[0] > 10 * lengths[1]


def test_the_rule_of_the_learning_rate(recipe_of) -> None:
    """Warm-up of 2 steps; a cosine over 10 steps, or constant."""

    def factors(recipe: Recipe) -> list[float]:
        return [learning_rate_factor(recipe, step) for step in (0, 1, 5, 9)]

    assert factors(recipe_of(steps=10)) == pytest.approx([0.5, 0.97553, 0.5, 0.02447], abs=1e-5)
    constant = {"learning_rate_schedule": "constant", "warmup_steps": 4}
    assert factors(recipe_of(steps=10, optimizer=constant)) == [0.25, 0.5, 1, 1]
