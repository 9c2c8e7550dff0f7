"""torchao's QAT: its numerics, its bits, who gets a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao")

from torchao.quantization.qat import FakeQuantizedLinear as TorchaoLinear

from benchmarks.method.baselines import bits_per_weight
from benchmarks.method.torchao_qat import prepare_torchao, torchao_linear
from fbqat_hub.quantization import ActivationScheme, named_layers
from fbqat_hub.quantization.activation import fake_quantize_activation
from fbqat_hub.quantization.fake_quantize import quantize
from tests.benchmarks.conftest import Scene, assert_every_layer_is, assert_feed_forward_trains

A8 = ActivationScheme()


@pytest.mark.parametrize(("group_size", "bits"), [(None, 4 + 32 / 48), (16, 6.0), (32, 6.0)])
def test_bits_of_torchao(outliers: tuple[nn.Linear, Tensor], group_size: int | None, bits: float) -> None:
    """32 does not divide 48: groups of 16."""
    assert bits_per_weight(torchao_linear(outliers[0], 4, A8, group_size)) == pytest.approx(bits, abs=1e-12)


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


@pytest.fixture(scope="module")
def student(scene: Scene) -> nn.Module:
    return prepare_torchao(*scene.arguments)


def test_gradients_reach_the_layers_that_train(scene: Scene, student: nn.Module) -> None:
    assert_feed_forward_trains(scene, student, ("weight",), "bias")


def test_every_layer_is_replaced(scene: Scene, student: nn.Module) -> None:
    """The last one with float activations."""
    assert_every_layer_is(scene, student, TorchaoLinear)
    for name, layer in named_layers(student, TorchaoLinear):
        assert (layer.activation_fake_quantizer is None) == (name == "proj_out")
