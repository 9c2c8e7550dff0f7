"""What is drawn depends on what it is for, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbqat_hub.families import get_family
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loss import held_out_loss, mean_squared


def held_out(scene, batch_size: int, seed: int = 0, draws: int = 2) -> dict[str, Tensor]:
    """Every held-out input of the training split, in the order of the draws."""
    drawn = Draws(get_family("sana"), scene.draws.scheduler, {}, seed)
    batches = list(drawn.held_out(scene.splits["train"], draws, batch_size))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_every_draw_has_random_numbers_of_its_own(scene_of) -> None:
    """Steps, seeds and the three streams (training, calibration, held-out) never share noise."""
    scene = scene_of()
    split, scheduler, noisy = scene.splits["test"], scene.draws.scheduler, []
    for seed in (0, 1, 2):
        draws = Draws(get_family("sana"), scheduler, {}, seed)
        noisy += [draws.training(split, step, 1) for step in (0, 1, 2, 3)]
        noisy += list(draws.calibration(split, 2))
    noisy += list(draws.held_out(split, 2, 1))
    assert len({float(inputs["hidden_states"].sum()) for inputs in noisy}) == len(noisy) == 20
    again = Draws(get_family("sana"), scheduler, {}, 0).training(split, 0, 1)
    assert torch.equal(again["hidden_states"], noisy[0]["hidden_states"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 32])
def test_held_out_draws_are_the_same_for_every_seed_and_batch_size(batch_size: int, scene_of) -> None:
    scene = scene_of()
    expected, found = held_out(scene, 10), held_out(scene, batch_size, seed=7)
    assert len(expected["timestep"]) == 20
    assert len(set(expected["timestep"].tolist())) == 20
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_held_out_loss_does_not_depend_on_the_batch_size(scene_of) -> None:
    scene = scene_of(method="vqat")
    student = scene.student()
    losses = [
        held_out_loss(student, scene.teacher, scene.splits["train"], scene.draws, repeats=2, batch_size=size)
        for size in (3, 32)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 20


def test_a_sample_counts_by_its_weight() -> None:
    prediction, target = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.zeros(2, 2)
    assert mean_squared(prediction, target).item() == pytest.approx((1 + 9 + 4 + 4) / 4)
    assert mean_squared(prediction, target, torch.tensor([0.5, 2.0])).item() == pytest.approx((5 + 16) / 4)
