"""Baselines: the branch is exact, SVDQuant helps, bits are counted, torchao's numerics, who gets a gradient."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.method.baselines import (
    LowRankLinear,
    Pointwise,
    TorchaoLinear,
    bits_per_weight,
    prepare_low_rank,
    prepare_torchao,
    svdquant,
    torchao_linear,
)
from fbqat_hub.families import get_family
from fbqat_hub.integrations.diffusers import load_pipeline
from fbqat_hub.quantization import (
    ActivationScheme,
    FakeQuantizedLinear,
    WeightScheme,
    named_layers,
    quantization_disabled,
)
from fbqat_hub.quantization.activation import fake_quantize_activation
from fbqat_hub.quantization.fake_quantize import quantize
from fbqat_hub.training.distill import Draws, cached_splits, held_out_loss
from fbqat_hub.training.recipe import Recipe

MSE = WeightScheme(clip="mse")
A8 = ActivationScheme()


@pytest.fixture(scope="module")
def outliers() -> tuple[nn.Linear, Tensor]:
    """A layer of 48 inputs with three large ones, and its input, whose activations are large in two others."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    linear.weight.data[:, [3, 17, 40]] *= 20
    tokens = torch.randn(256, 48)
    tokens[:, [5, 30]] *= 20
    return linear, tokens


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


@pytest.mark.parametrize(("group_size", "bits"), [(None, 4 + 32 / 48), (16, 6.0), (32, 6.0)])
def test_bits_of_torchao(outliers: tuple[nn.Linear, Tensor], group_size: int | None, bits: float) -> None:
    """32 does not divide 48: groups of 16."""
    assert bits_per_weight(torchao_linear(outliers[0], 4, A8, group_size)) == pytest.approx(bits, abs=1e-12)


def test_bits_of_a_float_model() -> None:
    with pytest.raises(ValueError, match="prepare it"):
        bits_per_weight(nn.Linear(4, 4))


# torchao


@pytest.mark.parametrize("group_size", [None, 16])
def test_torchao_is_our_equations_on_its_grid(outliers: tuple[nn.Linear, Tensor], group_size: int | None) -> None:
    """Two differences from ours: a step is max|W| / 7.5 and not / 7, and a token's range is [min, max] with a zero
    point and not symmetric. A group's largest magnitude is made positive: -7.5 steps are -7 or -8 by chance."""
    linear, tokens = outliers
    grouped = linear.weight.detach().reshape(32, -1, group_size or 48)
    grouped = grouped * grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).sign()
    linear = copy.deepcopy(linear)
    linear.weight.data = grouped.reshape(32, 48)
    step = grouped.amax(-1, keepdim=True) / 7.5
    weight = (quantize(grouped, step, 4) * step).reshape(32, 48)
    low, high = tokens.amin(-1, keepdim=True).clamp(max=0), tokens.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    affine = fake_quantize_activation(tokens, ActivationScheme(range="static"), scale, -(low / scale).round())
    layer = torchao_linear(linear, 4, A8, group_size)
    torch.testing.assert_close(layer(tokens), nn.functional.linear(affine, weight, linear.bias), rtol=1e-4, atol=1e-4)


def test_torchao_refuses_static_activations(outliers: tuple[nn.Linear, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'static'; torchao's QAT has .* 'per_token' only"):
        torchao_linear(outliers[0], 4, ActivationScheme(range="static"), None)


# whole students


@pytest.fixture(scope="module")
def setting(recipe_fields: dict[str, Any]) -> tuple[Recipe, nn.Module, Any, Draws]:
    recipe = Recipe(
        **{**recipe_fields, "method": "vqat", "train_layers": "feed_forward", "calibration": {"samples": 4}}
    )
    pipeline = load_pipeline(recipe.teacher)
    splits = cached_splits(recipe, pipeline)
    return recipe, pipeline.transformer, splits, Draws(get_family("sana"), pipeline.scheduler, recipe.seed)


@pytest.fixture(scope="module")
def students(setting: tuple[Recipe, nn.Module, Any, Draws]) -> dict[str, nn.Module]:
    recipe, teacher, splits, draws = setting
    return {
        "svdquant": prepare_low_rank(recipe, teacher, splits["train"], draws, rank=2, train=False),
        "svdqat": prepare_low_rank(recipe, teacher, splits["train"], draws, rank=2, train=True),
        "torchao-qat": prepare_torchao(recipe, teacher, splits["train"], draws),
    }


@pytest.mark.parametrize("method", ["svdqat", "torchao-qat"])
def test_gradients_reach_the_layers_that_train(setting: Any, students: dict[str, nn.Module], method: str) -> None:
    """Every parameter of the feed-forward's 1x1 convolutions, branch included, and nothing else."""
    _, teacher, splits, draws = setting
    student = students[method]
    draws.predict(student, draws.training(splits["train"], 0, 4)).square().sum().backward()
    reached = {name for name, each in student.named_parameters() if each.grad is not None and each.grad.abs().sum()}
    names = {f"transformer_blocks.{block}.ff.{conv}" for block in range(2) for conv in ("conv_inverted", "conv_point")}
    of_a_layer = ("down", "up", "residual.weight") if method == "svdqat" else ("weight",)
    expected = {f"{name}.linear.{part}" for name in names for part in of_a_layer}
    bias = "residual.bias" if method == "svdqat" else "bias"
    expected |= {f"{name}.linear.{bias}" for name in names if "inverted" in name}
    assert reached == expected
    assert {name for name, each in student.named_parameters() if each.requires_grad} == expected
    assert all(each.grad is None for each in teacher.parameters())


@pytest.mark.parametrize("method", ["svdquant", "svdqat", "torchao-qat"])
def test_every_layer_is_replaced(setting: Any, students: dict[str, nn.Module], method: str) -> None:
    """All 27, 1x1 convolutions among them; the last one with 16-bit activations, or float ones under torchao."""
    _, teacher, splits, draws = setting
    student = students[method]
    kind = TorchaoLinear if method == "torchao-qat" else LowRankLinear
    layers = dict(named_layers(student, kind))
    assert len(layers) == 27
    convolutions = {name for name, _ in named_layers(student, Pointwise)}
    assert convolutions == {
        name.removesuffix(".linear") for name in layers if name.endswith(".linear") and "ff." in name
    } | {"patch_embed.proj"}
    for name, layer in layers.items():
        if isinstance(layer, LowRankLinear):
            assert layer.residual.activation_scheme.bits == (16 if name == "proj_out" else 8)
            assert (layer.smoothing is not None) == (method == "svdquant")
            assert layer.residual.weight_scheme.clip == ("mse" if method == "svdquant" else "max_abs")
        else:
            assert (layer.activation_fake_quantizer is None) == (name == "proj_out")
    loss = held_out_loss(student, teacher, splits["test"], draws)
    scale = draws.predict(teacher, next(draws.held_out(splits["test"], 1, 4))).square().mean()
    assert 0 < sum(loss) / len(loss) < 0.1 * scale


def test_svdquant_is_not_trained(students: dict[str, nn.Module]) -> None:
    assert not any(each.requires_grad for each in students["svdquant"].parameters())


def test_rank_below_one(setting: tuple[Recipe, nn.Module, Any, Draws]) -> None:
    recipe, teacher, splits, draws = setting
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        prepare_low_rank(recipe, teacher, splits["train"], draws, rank=0, train=True)


def test_static_ranges_and_layers_left_alone(setting: tuple[Recipe, nn.Module, Any, Draws]) -> None:
    """The recipe's calibration reaches the residual, which sees smoothed inputs; proj_out stays as it was."""
    _, teacher, splits, draws = setting
    fields = {
        **setting[0].__dict__,
        "quantization": {"activation_range": "static", "modules_to_not_convert": ["proj_out"]},
    }
    fields["quantization"]["module_overrides"] = {}
    student = prepare_low_rank(Recipe(**fields), teacher, splits["train"], draws, rank=2, train=False)
    assert type(student.proj_out) is nn.Linear
    residuals = dict(named_layers(student, FakeQuantizedLinear))
    assert len(residuals) == 26
    assert all(layer.input_scale is not None and layer.input_scale > 0 for layer in residuals.values())
    assert all(fnmatchcase(name, "*.residual") for name in residuals)
    loss = held_out_loss(student, teacher, splits["test"], draws)
    assert all(torch.isfinite(torch.tensor(loss)))
