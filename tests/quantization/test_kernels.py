"""Every kernel against the reference: the integer part exactly, the scaling to float rounding."""

import copy

import pytest
import torch

from fbqat_hub.quantization import ActivationScheme, PackedLinear
from fbqat_hub.quantization.activation import fake_quantize_activation, quantize_activation
from fbqat_hub.quantization.kernels import cpu, packed_linear_reference
from fbqat_hub.quantization.packing import pack_int4

needs_cpu_kernel = pytest.mark.skipif(
    not cpu.is_supported(torch.ones(1), ActivationScheme()), reason="the CPU kernel needs x86 with AVX2"
)
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 33, 17), (256, 1152, 144), (2, 1153, 64), (9, 8000, 5)]


def layer_of(in_features: int, out_features: int, scheme: ActivationScheme, *, bias: bool = True) -> PackedLinear:
    torch.manual_seed(in_features)
    layer = PackedLinear(in_features, out_features, bias=bias, activation_scheme=scheme)
    codes = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
    layer.weight_packed.data.copy_(pack_int4(codes))
    layer.weight_scale.copy_(torch.rand(out_features) * 0.02 + 1e-3)
    if layer.bias is not None:
        layer.bias.data.normal_()
    if layer.input_scale is not None and layer.input_zero_point is not None:
        layer.input_scale.fill_(0.02)
        layer.input_zero_point.fill_(113)
    return layer


def reference(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return packed_linear_reference(
        x,
        layer.weight_packed,
        layer.weight_scale,
        layer.bias,
        layer.activation_scheme,
        layer.input_scale,
        layer.input_zero_point,
    )


@needs_cpu_kernel
@pytest.mark.parametrize("activation_range", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_cpu_kernel_equals_reference(shape: tuple[int, int, int], activation_range: str, bias: bool) -> None:
    tokens, in_features, out_features = shape
    layer = layer_of(in_features, out_features, ActivationScheme(range=activation_range), bias=bias)
    x = 3 * torch.randn(tokens, in_features)
    x[0, 0] = 0
    y = layer(x)
    assert layer._prepared is not None, "the CPU kernel did not run"
    # both scale the same integers; the order of two or three float roundings differs
    torch.testing.assert_close(y, reference(layer, x), rtol=1e-6, atol=1e-6 * float(y.abs().max()))


@needs_cpu_kernel
@pytest.mark.parametrize("extreme", [-8, 7])
def test_cpu_kernel_is_exact_where_16_bit_sums_could_saturate(extreme: int) -> None:
    """Largest codes and activations of one sign: 2 x 255 x 8 fits 16 bits, so AVX2 sums stay exact."""
    layer = layer_of(8000, 4, ActivationScheme(range="static"), bias=False)
    layer.weight_packed.data.copy_(pack_int4(torch.full((4, 8000), extreme, dtype=torch.int8)))
    layer.weight_scale.fill_(1.0)
    layer.input_zero_point.fill_(0)
    x = torch.full((3, 8000), 255 * 0.02)
    codes, scale, _ = quantize_activation(x, layer.activation_scheme, layer.input_scale, layer.input_zero_point)
    assert codes.eq(255).all()
    assert torch.equal(layer(x), torch.full((3, 4), 255.0 * extreme * 8000) * scale)


def test_changed_weights_are_seen_by_the_next_forward() -> None:
    layer = layer_of(32, 8, ActivationScheme())
    x = torch.randn(4, 32)
    before = layer(x)
    with torch.no_grad():
        layer.weight_packed.copy_(pack_int4(-7 * torch.ones(8, 32, dtype=torch.int8)))
    after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, reference(layer, x))


def test_a_layer_that_has_run_can_be_copied_and_saved() -> None:
    layer = layer_of(32, 8, ActivationScheme())
    x = torch.randn(4, 32)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "bias"}


@pytest.mark.parametrize("activation_range", ["per_token", "static"])
def test_gradient_of_the_input_is_that_of_the_fake_quantized_one(activation_range: str) -> None:
    layer = layer_of(16, 8, ActivationScheme(range=activation_range))
    x = (3 * torch.randn(4, 16)).requires_grad_()
    grad = torch.randn(4, 8)
    (found,) = torch.autograd.grad(layer(x), x, grad)
    fake = fake_quantize_activation(x, layer.activation_scheme, layer.input_scale, layer.input_zero_point)
    (expected,) = torch.autograd.grad(fake @ layer.dequantize().t(), x, grad)
    torch.testing.assert_close(found, expected)
    assert bool(found.eq(0).any()) == (activation_range == "static")  # some of x lies beyond the static range


@pytest.mark.parametrize("scheme", [ActivationScheme(bits=16), ActivationScheme(bits=32)])
def test_other_widths_run_on_the_reference(scheme: ActivationScheme) -> None:
    layer = layer_of(64, 8, scheme)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), reference(layer, x))
    assert layer._prepared is None


def test_bfloat16_in_bfloat16_out() -> None:
    layer = layer_of(64, 8, ActivationScheme())
    assert layer(torch.randn(5, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
