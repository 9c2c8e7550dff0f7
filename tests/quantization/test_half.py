"""In bfloat16 and float16 a layer is its float32 computation on the same codes, but for the rounding of its output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import (
    ActivationScheme,
    FakeQuantizedLinear,
    FakeQuantizedPointwiseConv2d,
    PackedLinear,
    WeightScheme,
)

HALF = [torch.bfloat16, torch.float16]
GRANULARITIES: dict[str, dict[str, Any]] = {
    "per_tensor": {"granularity": "per_tensor"},
    "per_channel": {},
    "per_group": {"granularity": "per_group", "group_size": 16},
}
ACTIVATIONS = [
    ActivationScheme(),
    ActivationScheme(range="per_tensor"),
    ActivationScheme(range="static"),
    ActivationScheme(bits=16),
    ActivationScheme(bits=16, range="static"),
    ActivationScheme(bits=32),
]


def make(activations: ActivationScheme, *, bits: float = 4, **weights: Any) -> FakeQuantizedLinear:
    torch.manual_seed(0)
    layer = FakeQuantizedLinear(nn.Linear(512, 64), WeightScheme(clip="mse", **weights), activations)
    layer.set_bit_width(bits)
    if activations.range == "static":
        layer.set_input_range(8 / 2**activations.bits, 2**activations.bits // 3)
    return layer


def inputs(dtype: torch.dtype) -> Tensor:
    """Values of ``dtype``, in float32."""
    return (2 * torch.randn(3, 10, 512, generator=torch.Generator().manual_seed(1))).to(dtype).float()


def assert_rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Half a step of ``dtype``; 2e-5 for sums of 512 products in another order."""
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2e-5
    assert bool(((found.float() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", [4, 4.25, 9])
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_output_is_that_of_float32_rounded_once(
    granularity: str, activations: ActivationScheme, bits: float, dtype: torch.dtype
) -> None:
    layer, x = make(activations, bits=bits, **GRANULARITIES[granularity]), inputs(dtype)
    exact = layer(x).detach()
    assert_rounded(layer(x.to(dtype)), exact, dtype)
    with torch.autocast("cpu", dtype):
        assert_rounded(layer(x), exact, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_large_sums_do_not_overflow(dtype: torch.dtype) -> None:
    """Codes of one sign: 512 * 127 * 7 is beyond float16's 65504, and scaled it is not."""
    layer = make(ActivationScheme())
    layer.weight.data.fill_(0.01)
    layer.set_bit_width(5)
    layer.set_bit_width(4)
    x = torch.full((2, 512), 0.5)
    assert_rounded(layer(x.to(dtype)), layer(x).detach(), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_are_those_of_float32_to_half_precision(
    granularity: str, activations: ActivationScheme, dtype: torch.dtype
) -> None:
    """Of weight, bias, learned clip and input; none where a static range clips the input."""
    random = torch.Generator().manual_seed(2)
    grad = torch.randn(3, 10, 64, generator=random).to(dtype).float()
    found = []
    for half in (False, True):
        layer = make(activations, **{**GRANULARITIES[granularity]})
        layer = FakeQuantizedLinear(layer, WeightScheme(clip="learned", **GRANULARITIES[granularity]), activations)
        if activations.range == "static":
            layer.set_input_range(8 / 2**activations.bits, 2**activations.bits // 3)
        x = inputs(dtype).to(dtype if half else torch.float32).requires_grad_()
        layer(x).backward(grad.to(dtype if half else torch.float32))
        found.append([x.grad.float(), *(parameter.grad for parameter in layer.parameters())])
        assert {each.grad.dtype for each in layer.parameters()} == {torch.float32}
    if activations.range == "static":
        assert torch.equal(found[0][0] == 0, found[1][0] == 0)
        assert bool((found[0][0] == 0).any())
    for exact, rounded in zip(*found, strict=True):
        # sums of products whose factors are rounded: a few steps of the norm
        assert (rounded - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_a_convolution_under_autocast() -> None:
    layer = FakeQuantizedPointwiseConv2d(nn.Conv2d(512, 8, 1), WeightScheme(), ActivationScheme())
    x = torch.randn(2, 512, 3, 3)
    exact = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert_rounded(layer(x), exact, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activations", [ActivationScheme(bits=16), ActivationScheme(bits=32), ActivationScheme()])
def test_autocast_does_not_touch_a_packed_layer(activations: ActivationScheme, dtype: torch.dtype) -> None:
    """Per-group scales and inputs of 16 bits run on the reference, whose products autocast would round."""
    layer = PackedLinear.from_fake_quantized(make(activations, granularity="per_group", group_size=16))
    for x in (inputs(dtype), inputs(dtype).to(dtype)):
        exact = layer(x)
        with torch.autocast("cpu", dtype):
            assert torch.equal(layer(x), exact)
            x.requires_grad_()
            assert torch.equal(layer(x), exact)


def test_a_layer_whose_quantization_is_off_is_a_linear_layer() -> None:
    layer, x = make(ActivationScheme()), inputs(torch.bfloat16).bfloat16()
    layer.enabled = False
    expected = nn.functional.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16())
    assert torch.equal(layer(x), expected)
