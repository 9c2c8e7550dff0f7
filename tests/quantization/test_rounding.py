"""Rounding: what comes back on the way through it."""

from __future__ import annotations

import math

import pytest
import torch

from fbqat_hub.quantization import Rounding, fake_quantize

STEPS = torch.tensor([-9.0, -2.7, -0.4, 0.3, 1.6, 6.8, 9.0], dtype=torch.float64)
GRAD = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0], dtype=torch.float64)
REST = torch.tensor([0.0, 0.3, -0.4, 0.3, -0.4, -0.2, 0.0], dtype=torch.float64)  # v - round(v)
INSIDE = torch.tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.float64)


def test_ewgs_is_the_published_rule_where_nothing_is_clipped_and_leaves_the_forward_alone() -> None:
    clip = torch.tensor(3.5, dtype=torch.float64)  # S = 1/2
    weight = (STEPS / 2).requires_grad_()
    on_grid = fake_quantize(weight, clip, 4, rounding=Rounding(0.2))
    assert torch.equal(on_grid, fake_quantize(weight, clip, 4))
    (found,) = torch.autograd.grad(on_grid, weight, GRAD)
    torch.testing.assert_close(found, INSIDE * GRAD * (1 + 0.2 * GRAD.sign() * REST))


def test_without_ewgs_the_gradient_passes() -> None:
    assert torch.equal(Rounding().backward(GRAD, STEPS), GRAD)


@pytest.mark.parametrize("ewgs", [-1.0, math.inf, math.nan])
def test_ewgs_out_of_range_is_refused(ewgs: float) -> None:
    with pytest.raises(ValueError, match="ewgs is"):
        Rounding(ewgs)
