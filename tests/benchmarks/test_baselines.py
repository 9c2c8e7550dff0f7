"""Baselines: the branch is exact, SVDQuant helps, bits are counted, who gets a gradient."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn

from benchmarks.method.baselines import LowRankLinear, bits_per_weight, prepare_low_rank, svdquant
from fbqat_hub.quantization import (
    ActivationScheme,
    FakeQuantizedLinear,
    WeightScheme,
    named_layers,
    quantization_disabled,
)
from fbqat_hub.training.loss import held_out_loss
from tests.benchmarks.conftest import Scene, assert_every_layer_is, assert_feed_forward_trains

MSE = WeightScheme(clip="mse")
A8 = ActivationScheme()


@torch.no_grad()
def error(layer: nn.Module, linear: nn.Linear, tokens: Tensor) -> float:
    return float((layer(tokens) - linear(tokens)).square().mean())


# the low-rank layer


@pytest.mark.parametrize("smoothing", [None, torch.linspace(0.25, 4, 48)])
def test_branch_and_float_residual_are_the_layer(outliers: tuple[nn.Linear, Tensor], smoothing: Tensor | None) -> None:
    linear, tokens = outliers
    layer = LowRankLinear(linear, MSE, A8, 4, smoothing)
    with quantization_disabled(layer):
        torch.testing.assert_close(layer(tokens), linear(tokens), rtol=1e-5, atol=1e-4)
    assert error(layer, linear, tokens) > 1e-4  # and with its quantization it is not


def test_branch_takes_the_largest_singular_values() -> None:
    """A weight of rank 2 is all branch: what is left for 4 bits is the rounding of float16."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 12)
    linear.weight.data = torch.randn(12, 2) @ torch.randn(2, 16)
    largest = linear.weight.abs().max()
    assert LowRankLinear(linear, MSE, A8, 2).residual.weight.abs().max() < 1e-2 * largest
    assert LowRankLinear(linear, MSE, A8, 1).residual.weight.abs().max() > 0.1 * largest


def test_svdquant_beats_mse_clip_on_outliers(outliers: tuple[nn.Linear, Tensor]) -> None:
    """On fresh inputs: rank 4 of 32 takes the three outlier columns, and smoothing the large activations."""
    linear, tokens = outliers
    calibration, fresh = tokens[:128], tokens[128:]
    plain = FakeQuantizedLinear(linear, MSE, A8)
    searched = svdquant(linear, MSE, A8, 4, calibration, calibration.abs().amax(0))
    assert error(searched, linear, fresh) < 0.2 * error(plain, linear, fresh)
    assert error(searched, linear, fresh) < error(LowRankLinear(linear, MSE, A8, 4), linear, fresh)


def test_rank_of_a_small_side(outliers: tuple[nn.Linear, Tensor]) -> None:
    layer = LowRankLinear(outliers[0], MSE, A8, 100)
    assert layer.down.shape == (32, 48)
    assert layer.up.shape == (32, 32)


# bits


def test_bits_of_one_layer(outliers: tuple[nn.Linear, Tensor]) -> None:
    """48 x 32 weights: 4 bits, 32 float32 scales, a branch of 4 x (48 + 32) and 48 smoothing factors of float16."""
    layer = LowRankLinear(outliers[0], MSE, A8, 4, torch.ones(48))
    assert bits_per_weight(layer) == 4 + (32 * 32 + 4 * 80 * 16 + 48 * 16) / 1536 == 8.5
    assert bits_per_weight(LowRankLinear(outliers[0], MSE, A8, 4)) == 8.0


def test_bits_of_a_float_model() -> None:
    with pytest.raises(ValueError, match="prepare it"):
        bits_per_weight(nn.Linear(4, 4))


# whole students


@pytest.fixture(scope="module")
def students(scene: Scene) -> dict[str, nn.Module]:
    return {
        "svdquant": prepare_low_rank(*scene.arguments, rank=2, train=False),
        "svdqat": prepare_low_rank(*scene.arguments, rank=2, train=True),
    }


def test_gradients_reach_residual_and_branch(scene: Scene, students: dict[str, nn.Module]) -> None:
    assert_feed_forward_trains(scene, students["svdqat"], ("down", "up", "residual.weight"), "residual.bias")


@pytest.mark.parametrize("method", ["svdquant", "svdqat"])
def test_every_layer_is_replaced(scene: Scene, students: dict[str, nn.Module], method: str) -> None:
    """The last one with 16-bit activations."""
    assert_every_layer_is(scene, students[method], LowRankLinear)
    for name, layer in named_layers(students[method], LowRankLinear):
        assert layer.residual.activation_scheme.bits == (16 if name == "proj_out" else 8)
        assert (layer.smoothing is not None) == (method == "svdquant")
        assert layer.residual.weight_scheme.clip == ("mse" if method == "svdquant" else "max_abs")


def test_svdquant_is_not_trained(students: dict[str, nn.Module]) -> None:
    assert not any(each.requires_grad for each in students["svdquant"].parameters())


def test_rank_below_one(scene: Scene) -> None:
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        prepare_low_rank(*scene.arguments, rank=0, train=True)


def test_static_ranges_and_layers_left_alone(scene: Scene) -> None:
    """The recipe's calibration reaches the residual, which sees smoothed inputs; proj_out stays as it was."""
    quantization = {"activation_range": "static", "modules_to_not_convert": ["proj_out"], "module_overrides": {}}
    recipe = replace(scene.recipe, quantization=quantization)
    student = prepare_low_rank(recipe, *scene.arguments[1:], rank=2, train=False)
    assert type(student.proj_out) is nn.Linear
    residuals = dict(named_layers(student, FakeQuantizedLinear))
    assert len(residuals) == 26
    assert all(layer.input_scale is not None and layer.input_scale > 0 for layer in residuals.values())
    assert all(fnmatchcase(name, "*.residual") for name in residuals)
    loss = held_out_loss(student, scene.teacher, scene.splits["test"], scene.draws)
    assert all(torch.isfinite(torch.tensor(loss)))
