"""The layers: what they compute, what their gradients are, what they keep, and what they refuse."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import (
    ActivationScheme,
    FakeQuantizedLinear,
    FakeQuantizedPointwiseConv2d,
    PackedLinear,
    PackedPointwiseConv2d,
    Rounding,
    WeightScheme,
)
from fbqat_hub.quantization.clip import mse_clip
from fbqat_hub.quantization.layer import is_pointwise

FLOAT_INPUT = ActivationScheme(bits=32)
GRANULARITIES: dict[str, dict[str, Any]] = {
    "per_tensor": {"granularity": "per_tensor"},
    "per_channel": {"granularity": "per_channel"},
    "per_group": {"granularity": "per_group", "group_size": 4},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(
    in_features: int = 12, out_features: int = 5, *, activations: ActivationScheme = FLOAT_INPUT, **weights: Any
) -> FakeQuantizedLinear:
    return FakeQuantizedLinear(nn.Linear(in_features, out_features), WeightScheme(**weights), activations)


def groups_of(weight: Tensor, granularity: str) -> list[np.ndarray]:
    """The values that share a scale, in order."""
    array = weight.detach().double().numpy().reshape(weight.shape[0], -1)
    if granularity == "per_tensor":
        return [array.ravel()]
    if granularity == "per_channel":
        return list(array)
    return [part for row in array for part in np.split(row, array.shape[1] // 4)]


@pytest.mark.parametrize("bits", [2, 3.3, 4, 4.25, 5.5, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weight_is_that_of_the_equation(granularity: str, bits: float) -> None:
    layer = make(**GRANULARITIES[granularity])
    layer.set_bit_width(bits)
    expected = []
    for group in groups_of(layer.weight, granularity):
        scale = np.abs(group).max() / (2 ** (bits - 1) - 1)
        half = math.floor(2 ** (bits - 1))
        expected.append(scale * np.clip(np.rint(group / scale), -half, half - 1))
    found = layer.fake_quantized_weight().detach()
    np.testing.assert_allclose(found.ravel(), np.concatenate(expected), rtol=1e-5, atol=1e-7)  # float32 against float64


def test_forward_quantizes_both() -> None:
    layer = make(activations=ActivationScheme(range="per_tensor"))
    x = torch.randn(3, 2, 12)
    scale = x.abs().max() / 127
    expected = (x / scale).round() * scale @ layer.fake_quantized_weight().T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer.enabled = False
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_pointwise_convolution_is_the_linear_layer_of_every_position() -> None:
    convolution = nn.Conv2d(6, 4, 1)
    layer = FakeQuantizedPointwiseConv2d(convolution, WeightScheme(), ActivationScheme())
    assert layer.weight.shape == convolution.weight.shape
    linear = nn.Linear(6, 4)
    linear.weight.data, linear.bias.data = convolution.weight.data[:, :, 0, 0], convolution.bias.data
    twin = FakeQuantizedLinear(linear, WeightScheme(), ActivationScheme())
    x = torch.randn(2, 6, 3, 5)
    found = layer(x)
    assert found.shape == (2, 4, 3, 5)
    torch.testing.assert_close(found[1, :, 2, 4], twin(x[1, :, 2, 4]))
    packed = PackedPointwiseConv2d.from_fake_quantized(layer)
    torch.testing.assert_close(packed(x)[1, :, 2, 4], PackedLinear.from_fake_quantized(twin)(x[1, :, 2, 4]))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 1, padding="valid"), True),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(4, 4, 1, stride=2), False),
        (nn.Conv2d(4, 4, 1, padding=1), False),
        (nn.Conv2d(4, 4, 3, padding=1), False),
        (nn.Conv1d(4, 4, 1), False),
        (nn.Linear(4, 4), False),
    ],
    ids=str,
)
def test_pointwise(module: nn.Module, expected: bool) -> None:
    assert is_pointwise(module) is expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_learned_clip_gets_the_gradient_of_lsq(granularity: str) -> None:
    """With s the scale: dL/ds = 1/sqrt(N Qp) * sum g * (Q - v inside, the bound outside); log_clip gets s * dL/ds."""
    layer = make(clip="learned", **GRANULARITIES[granularity])
    with torch.no_grad():
        layer.clip.log_clip -= 0.5  # so that something is clipped
    grad = torch.randn(5, 12)
    layer.fake_quantized_weight().backward(grad)
    assert layer.clip.log_clip.grad is not None
    scales = layer.clip.log_clip.detach().double().exp().numpy().ravel() / 7
    found = layer.clip.log_clip.grad.numpy().ravel()
    for index, (group, g) in enumerate(
        zip(groups_of(layer.weight, granularity), groups_of(grad, granularity), strict=True)
    ):
        v = group / scales[index]
        per_step = np.where(v < -8, -8, np.where(v > 7, 7, np.rint(v) - v))
        expected = scales[index] * (g * per_step).sum() / math.sqrt(group.size * 7)
        assert found[index] == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_training_moves_weight_and_learned_clip_and_lowers_the_loss() -> None:
    layer = make(32, 16, clip="learned", bits=3)
    x = torch.randn(64, 32)
    target = nn.Linear(32, 16)(x).detach()
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("clip", ["mse", "learned"])
def test_clip_is_set_anew_when_the_width_changes_and_only_then(clip: Any) -> None:
    layer = make(clip=clip)
    best = {bits: mse_clip(layer.weight.detach(), bits) for bits in (4, 6)}
    torch.testing.assert_close(layer.current_clip().detach(), best[4])
    layer.set_bit_width(6)
    torch.testing.assert_close(layer.current_clip().detach(), best[6])

    with torch.no_grad():
        layer.weight += torch.randn_like(layer.weight)
    layer.set_bit_width(6, Rounding(0.5))
    assert layer.rounding.ewgs == 0.5
    torch.testing.assert_close(layer.current_clip().detach(), best[6])
    layer.set_bit_width(4)
    torch.testing.assert_close(layer.current_clip().detach(), mse_clip(layer.weight.detach(), 4))


@pytest.mark.parametrize("clip", ["max_abs", "mse", "learned"])
def test_state_dict_round_trip_of_a_calibrated_layer(clip: Any) -> None:
    """A resumed layer is the interrupted one, bit for bit, and its clip is not searched again."""
    static = ActivationScheme(range="static")
    layer, x = make(clip=clip, activations=static), torch.randn(3, 12)
    layer.set_input_range(0.03, 120)
    layer.set_bit_width(4.25)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    other = make(clip=clip, activations=static)
    assert other.load_state_dict(layer.state_dict()).missing_keys == []
    other.set_bit_width(4.25)
    assert torch.equal(other.current_clip(), layer.current_clip())
    assert torch.equal(other(x), layer(x))
    assert other.input_zero_point is not None
    assert other.input_zero_point.dtype == torch.int32


def test_loading_is_strict() -> None:
    layer = make(activations=ActivationScheme(range="static"))
    layer.set_input_range(0.03, 120)
    with pytest.raises(RuntimeError, match="input_scale"):
        layer.load_state_dict(make().state_dict())


@pytest.mark.parametrize("bits", [1, 1.999, 17, math.nan, math.inf])
def test_bit_width_out_of_range_is_refused(bits: float) -> None:
    layer = make()
    with pytest.raises(ValueError, match="bit width"):
        layer.set_bit_width(bits)
    with pytest.raises(ValueError, match="bit width"):
        WeightScheme(bits=bits)
    assert layer.bit_width == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "per_row"}, "'per_tensor', 'per_channel', 'per_group'"),
        ({"granularity": "per_group"}, "group_size goes with"),
        ({"group_size": 4}, "group_size goes with"),
        ({"granularity": "per_group", "group_size": 3}, "even"),
        ({"clip": "percentile"}, "'max_abs', 'mse', 'learned'"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightScheme(**changes)


@pytest.mark.parametrize("clip", ["max_abs", "mse", "learned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_keeps_scales_in_float32(clip: Any, dtype: torch.dtype) -> None:
    layer = make(clip=clip, activations=ActivationScheme(range="static"))
    layer.set_input_range(0.1 / 3, 120)
    packed = PackedLinear.from_fake_quantized(layer)
    for module in (layer, packed):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        module.to(dtype)
        for name, buffer in module.named_buffers():
            assert buffer.dtype == before[name].dtype, name
            assert torch.equal(buffer, before[name])
        assert module.bias is not None
        assert module.bias.dtype == dtype
        assert module(torch.randn(3, 12).to(dtype)).dtype == dtype
    assert packed.weight_packed.dtype == torch.uint8


class TestInputs:
    """Both kinds of layers, whatever the activation width, take what they are made for and say what that is."""

    SCHEMES = [ActivationScheme(), ActivationScheme(range="per_tensor"), ActivationScheme(bits=16), FLOAT_INPUT]

    @staticmethod
    def layers(scheme: ActivationScheme) -> list[nn.Module]:
        fake = make(64, 32, activations=scheme)
        disabled = make(64, 32, activations=scheme)
        disabled.enabled = False
        return [fake, disabled, PackedLinear.from_fake_quantized(fake)]

    @staticmethod
    def convolutions(scheme: ActivationScheme) -> list[nn.Module]:
        fake = FakeQuantizedPointwiseConv2d(nn.Conv2d(64, 32, 1), WeightScheme(), scheme)
        return [fake, PackedPointwiseConv2d.from_fake_quantized(fake)]

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("shape", [(3, 63), (63,), (2, 3, 65), (), (64, 3), (3, 0)])
    def test_other_shapes_are_refused_with_both(self, scheme: ActivationScheme, shape: tuple[int, ...]) -> None:
        message = rf"shape {re.escape(str(shape))}; the layer takes \[\.\.\., 64\] and gives \[\.\.\., 32\]"
        for layer in self.layers(scheme):
            with pytest.raises(ValueError, match=message):
                layer(torch.zeros(shape))

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("shape", [(1, 63, 4, 4), (63, 4, 4), (4, 4, 64), (4, 64), (1, 1, 64, 4, 4), ()])
    def test_convolutions_look_at_their_channels(self, scheme: ActivationScheme, shape: tuple[int, ...]) -> None:
        for layer in self.convolutions(scheme):
            with pytest.raises(ValueError, match=rf"shape {re.escape(str(shape))}; the layer takes \[N, 64, H, W\]"):
                layer(torch.zeros(shape))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_what_is_no_float_is_refused_by_its_dtype(self, dtype: torch.dtype) -> None:
        for layer, shape in [
            *((each, (3, 64)) for each in self.layers(ActivationScheme())),
            *((each, (1, 64, 2, 2)) for each in self.convolutions(ActivationScheme())),
        ]:
            with pytest.raises(ValueError, match=f"the input is {dtype}; .* takes float16, bfloat16, float32, float64"):
                layer(torch.zeros(shape).to(dtype))

    def test_another_device_is_named(self) -> None:
        for layer in self.layers(ActivationScheme()):
            with pytest.raises(ValueError, match="the input is on meta, the layer on cpu"):
                layer(torch.zeros(3, 64, device="meta"))

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_an_empty_batch_gives_an_empty_one(self, scheme: ActivationScheme) -> None:
        for layer in self.layers(scheme):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.zeros(0, 5, 64, dtype=dtype, requires_grad=True)
                y = layer(x)
                assert (y.shape, y.dtype) == ((0, 5, 32), dtype)
                y.sum().backward()
        for layer in self.convolutions(scheme):
            assert layer(torch.zeros(0, 64, 2, 3)).shape == (0, 32, 2, 3)

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_a_single_token_and_a_picture_without_a_batch(self, scheme: ActivationScheme) -> None:
        x, picture = torch.randn(64), torch.randn(64, 2, 3)
        for layer in self.layers(scheme):
            assert torch.equal(layer(x), layer(x[None])[0])
        for layer in self.convolutions(scheme):
            torch.testing.assert_close(layer(picture), layer(picture[None])[0])


class TestPacked:
    def test_too_many_bits_and_no_range_are_refused(self) -> None:
        layer = make()
        layer.set_bit_width(4.25)
        with pytest.raises(ValueError, match=r"4\.25 bits; set_bit_width\(4\)"):
            PackedLinear.from_fake_quantized(layer)
        with pytest.raises(ValueError, match="never calibrated"):
            PackedLinear.from_fake_quantized(make(activations=ActivationScheme(range="static")))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("clip", ["max_abs", "mse", "learned"])
    def test_weights_that_are_not_finite_are_refused(self, clip: Any, bad: float) -> None:
        layer = make(clip=clip)
        layer.weight.data[2, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            PackedLinear.from_fake_quantized(layer)

    def test_a_group_size_that_suits_no_divisor_is_refused(self) -> None:
        for build in (
            lambda: make(34, granularity="per_group", group_size=8),
            lambda: PackedLinear(34, 3, group_size=8),
        ):
            with pytest.raises(ValueError, match="the layer's 34 inputs: no even number from 4 to 8 divides"):
                build()

    def test_groups_are_smaller_where_the_size_does_not_divide(self) -> None:
        layer = make(20, granularity="per_group", group_size=8)
        assert PackedLinear.from_fake_quantized(layer).weight_scale.shape == (5, 5)
        of_four = FakeQuantizedLinear(layer, WeightScheme(granularity="per_group", group_size=4), FLOAT_INPUT)
        assert layer.fake_quantized_weight().equal(of_four.fake_quantized_weight())

    def test_a_layer_with_fewer_inputs_than_a_group_has_one_scale_an_output(self) -> None:
        per_channel = make(6)
        grouped = FakeQuantizedLinear(per_channel, WeightScheme(granularity="per_group", group_size=8), FLOAT_INPUT)
        assert grouped.fake_quantized_weight().equal(per_channel.fake_quantized_weight())
        packed = PackedLinear.from_fake_quantized(grouped)
        assert packed.weight_scale.shape == (5, 1)
        x = torch.randn(3, 6)
        assert packed(x).allclose(per_channel(x), atol=1e-6)

    @pytest.mark.parametrize("bias", [True, False])
    def test_to_float_is_the_dequantized_layer(self, bias: bool) -> None:
        random_state = torch.get_rng_state()
        packed = PackedLinear.from_fake_quantized(
            FakeQuantizedLinear(nn.Linear(7, 3, bias=bias), WeightScheme(), FLOAT_INPUT)
        )
        torch.set_rng_state(random_state)
        linear, x = packed.to_float(), torch.randn(2, 7)
        assert isinstance(linear, nn.Linear)
        assert torch.equal(linear.weight, packed.codes() * packed.weight_scale[:, None])
        torch.testing.assert_close(linear(x), packed(x))

    def test_to_float_of_a_convolution(self) -> None:
        fake = FakeQuantizedPointwiseConv2d(nn.Conv2d(7, 3, 1), WeightScheme(), FLOAT_INPUT)
        packed, x = PackedPointwiseConv2d.from_fake_quantized(fake), torch.randn(2, 7, 4, 4)
        torch.testing.assert_close(packed.to_float()(x), packed(x))

    def test_loading_other_weights_is_seen_by_the_kernel(self) -> None:
        """Whatever a kernel prepared from the old bytes must go."""
        one, other = (PackedLinear.from_fake_quantized(make(64, 64, activations=ActivationScheme())) for _ in range(2))
        x = torch.randn(4, 64)
        one(x)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), other(x))
