"""INT8 and INT16 inputs, dynamic and static, against numpy; and the gradient through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fbqat_hub.quantization import ActivationScheme
from fbqat_hub.quantization.activation import fake_quantize_activation, quantize_activation


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_dynamic(x: Tensor, bits: int, granularity: str) -> None:
    scheme = ActivationScheme(bits=bits, range=granularity)  # type: ignore[arg-type]
    codes, scale, zero_point = quantize_activation(x, scheme)
    axis = -1 if granularity == "per_token" else None
    top = 2 ** (bits - 1) - 1
    expected_scale = np.abs(x.double().numpy()).max(axis, keepdims=True) / top

    assert scale.shape == ((2, 5, 1) if granularity == "per_token" else ())
    np.testing.assert_allclose(np.broadcast_to(scale, expected_scale.shape), expected_scale, rtol=1e-6)
    assert zero_point == 0
    assert codes.abs().amax() == top
    assert bool((codes == codes.round()).all())
    # within half a step of the truth; 1e-3 steps for a float32 quotient of up to 32767
    assert np.abs(x.double().numpy() / expected_scale - codes.double().numpy()).max() <= 0.5 + 5e-3
    torch.testing.assert_close(fake_quantize_activation(x, scheme), codes * scale, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [8, 16])
def test_static(x: Tensor, bits: int) -> None:
    scheme = ActivationScheme(bits=bits, range="static")
    scale, zero_point = torch.tensor(5.0 / 2**bits), torch.tensor(2 ** (bits - 2), dtype=torch.int32)
    codes, _, _ = quantize_activation(x, scheme, scale, zero_point)
    expected = np.clip(np.rint(x.numpy() / np.float32(scale)) + int(zero_point), 0, 2**bits - 1)
    np.testing.assert_array_equal(codes, expected)
    assert {0, 2**bits - 1} <= set(codes.flatten().tolist())  # both ends clip

    found = fake_quantize_activation(x, scheme, scale, zero_point)
    np.testing.assert_array_equal(found, (expected - int(zero_point)).astype(np.float32) * np.float32(scale))


def test_a_token_of_zeros_is_zeros() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    found = fake_quantize_activation(x, ActivationScheme())
    assert found[0].tolist() == [0, 0]
    assert found[1, 1].item() == pytest.approx(-2)


def test_a_token_does_not_see_the_others(x: Tensor) -> None:
    together = fake_quantize_activation(x, ActivationScheme())
    assert torch.equal(together[1, 3], fake_quantize_activation(x[1, 3], ActivationScheme()))


def test_32_bits_leave_the_input_as_it_is(x: Tensor) -> None:
    assert fake_quantize_activation(x, ActivationScheme(bits=32)) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept_and_codes_are_float32(x: Tensor, dtype: torch.dtype) -> None:
    assert fake_quantize_activation(x.to(dtype), ActivationScheme()).dtype == dtype
    codes, scale, _ = quantize_activation(x.to(dtype), ActivationScheme(bits=16))
    assert codes.dtype == scale.dtype == torch.float32


def test_input_is_not_written_to(x: Tensor) -> None:
    before = x.clone()
    fake_quantize_activation(x, ActivationScheme())
    fake_quantize_activation(x, ActivationScheme(range="static"), torch.tensor(0.1), torch.tensor(3, dtype=torch.int32))
    assert torch.equal(x, before)


def test_gradient_is_one_and_nothing_where_a_static_range_clips() -> None:
    x = torch.tensor([-1.1, -1.0, -0.3, 0.0, 1.5, 1.6], requires_grad=True)
    grad = torch.arange(1.0, 7.0)
    (dynamic,) = torch.autograd.grad(fake_quantize_activation(x, ActivationScheme()), x, grad)
    assert torch.equal(dynamic, grad)

    scale, zero_point = torch.tensor(0.01), torch.tensor(100, dtype=torch.int32)  # -1.00 to 1.55
    found = fake_quantize_activation(x, ActivationScheme(range="static"), scale, zero_point)
    (static,) = torch.autograd.grad(found, x, grad)
    assert static.tolist() == [0, 2, 3, 4, 5, 0]


def test_static_without_a_range_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="calibrate"):
        fake_quantize_activation(x, ActivationScheme(range="static"))


@pytest.mark.parametrize("changes", [{"bits": 4}, {"range": "per_channel"}])
def test_unknown_schemes_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        ActivationScheme(**changes)  # type: ignore[arg-type]
