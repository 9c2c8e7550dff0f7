"""The distillation loss: mean squared distance of the predictions of student and teacher for the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws


def mean_squared(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of [N, ...], each of the N samples by its weight [N], if there is one."""
    if weight is not None:
        root = weight.sqrt().view(-1, *[1] * (target.dim() - 1))
        prediction, target = root * prediction, root * target
    return F.mse_loss(prediction, target)


@torch.no_grad()
def held_out_loss(
    student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws, *, repeats: int = 1, batch_size: int = 32
) -> list[float]:
    """The distillation loss of every held-out draw, never weighted: one mean over pixels a sample.

    Args:
        repeats: draws of each sample; the losses are in the order of the draws, and within one of the samples.
        batch_size: does not change what is drawn.
    """
    losses: list[float] = []
    for inputs in draws.held_out(split, repeats, batch_size):
        difference = draws.predict(student, inputs).float() - draws.predict(teacher, inputs).float()
        losses += difference.square().flatten(1).mean(1).tolist()
    return losses
