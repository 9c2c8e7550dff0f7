"""A checkpoint holds everything that the next step depends on, and says with what it was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fbqat_hub.training.checkpoint import load_checkpoint, save_checkpoint


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """A layer after some scaled steps, the second of which overflows; the scale grows every two good ones."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(steps):
        scaler.scale(model(torch.ones(1, 4)).sum() * (torch.inf if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, optimizer, scaler


@pytest.mark.parametrize(("steps", "scale"), [(1, 1024), (2, 512), (3, 512), (4, 1024)])
def test_the_scale_of_the_loss_goes_on_where_it_was(steps: int, scale: float, tmp_path: Path) -> None:
    """float16's: halved by an overflow, doubled after two steps without one."""
    model, optimizer, scaler = trained(steps)
    save_checkpoint(tmp_path, steps, model, optimizer, "steps: 4\n", scaler)
    other, its_optimizer, its_scaler = trained(0)
    assert load_checkpoint(tmp_path, other, its_optimizer, "steps: 4\n", its_scaler) == steps
    assert its_scaler.state_dict() == scaler.state_dict()
    assert its_scaler.get_scale() == scale
    assert torch.equal(other.weight, model.weight)


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    model, optimizer, _ = trained(1)
    save_checkpoint(tmp_path, 1, model, optimizer, "steps: 4\nadam: {decay: 0, rate: 1}\n")
    with pytest.raises(ValueError, match=r"another recipe, .*: adam\.rate: 1 -> 2; seed: \(none\) -> 3\. Give another"):
        load_checkpoint(tmp_path, model, optimizer, "steps: 4\nadam: {decay: 0, rate: 2}\nseed: 3\n")
