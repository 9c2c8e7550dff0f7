"""Every kernel against the reference: the integer part exactly, the scaling to float rounding."""

import copy
import subprocess
import sys

import pytest
import torch

from fbqat_hub.quantization import ActivationScheme, PackedLinear
from fbqat_hub.quantization.activation import fake_quantize_activation, quantize_activation
from fbqat_hub.quantization.kernels import cpu, packed_linear_reference
from fbqat_hub.quantization.packing import pack, pack_int4
from tests.conftest import subprocess_environment

needs_cpu_kernel = pytest.mark.skipif(
    not cpu.is_supported(torch.ones(1), ActivationScheme(), 4), reason="the CPU kernel needs x86 with AVX2"
)
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 33, 17), (256, 1152, 144), (2, 1153, 64), (9, 8000, 5)]


def layer_of(
    in_features: int, out_features: int, scheme: ActivationScheme, *, bias: bool = True, bits: int = 4
) -> PackedLinear:
    torch.manual_seed(in_features)
    layer = PackedLinear(in_features, out_features, weight_bits=bits, bias=bias, activation_scheme=scheme)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (out_features, in_features), dtype=torch.int8)
    layer.weight_packed.data.copy_(pack(codes, bits))
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


@needs_cpu_kernel
@pytest.mark.parametrize("bits", [5, 7, 8])
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
def test_wider_codes_equal_the_sum_in_float64(bits: int, activation_range: str) -> None:
    layer = layer_of(1153, 64, ActivationScheme(range=activation_range), bits=bits)
    x = 3 * torch.randn(7, 1153)
    codes, scale, zero_point = quantize_activation(
        x, layer.activation_scheme, layer.input_scale, layer.input_zero_point
    )
    whole = (codes - zero_point).double() @ layer.codes().double().t()
    expected = whole * layer.weight_scale.double() * scale.double() + layer.bias.double()
    for y in (layer(x), reference(layer, x)):
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6 * float(y.abs().max()))


@needs_cpu_kernel
@pytest.mark.parametrize("isa", ["", "AVX2"])
def test_wide_codes_are_exact_with_and_without_vnni(isa: str) -> None:
    """Largest codes and activations of one sign. Without VNNI 16-bit sums hold 7-bit codes; 8-bit ones, which they do
    not, run on the reference."""
    script = """
import torch
from fbqat_hub.quantization import ActivationScheme, PackedLinear
for bits in (7, 8):
    scheme = ActivationScheme(range="static")
    layer = PackedLinear(64, 16, weight_bits=bits, bias=False, activation_scheme=scheme)
    layer.weight_packed.data.fill_(-(2 ** (bits - 1)))
    layer.weight_scale.fill_(1.0), layer.input_scale.fill_(1.0), layer.input_zero_point.fill_(0)
    y = layer(torch.full((3, 64), 255.0))
    assert (y == -(2 ** (bits - 1)) * 255 * 64).all(), (bits, y)
    print(bits, layer._prepared is not None)
"""
    limited = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": isa.lower()} if isa else {}
    done = subprocess.run(
        [sys.executable, "-c", script], env=subprocess_environment(**limited), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 True\n")
    if isa:
        assert done.stdout == "7 True\n8 False\n"


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
