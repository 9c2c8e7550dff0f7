"""GPTQ codes: less error of what a layer computes than nearest rounding, and latents inside their bins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import (
    ActivationScheme,
    FakeQuantizedLinear,
    WeightScheme,
    gptq,
    gptq_initialize,
    named_layers,
    prepare,
)
from fbqat_hub.quantization.convert import run_batches
from fbqat_hub.quantization.gptq import gptq_codes

FLOAT_ACTIVATIONS = ActivationScheme(bits=32)


def correlated(samples: int, features: int, seed: int = 0) -> Tensor:
    """Inputs that lie near a space of a quarter of their dimensions, as hidden states do."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features // 4, features, generator=random)
    common = torch.randn(samples, features // 4, generator=random) @ mixing
    return common + 0.1 * torch.randn(samples, features, generator=random)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(96, 80)
        self.second = nn.Conv2d(80, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden.T[None, :, :, None])[0, :, :, 0].T


@pytest.fixture
def x() -> Tensor:
    return correlated(512, 96)


@pytest.mark.parametrize("damping", [0.0, 1e39])
def test_a_damping_that_does_not_do_is_named(damping: float) -> None:
    """Eight inputs of 96 numbers."""
    with pytest.raises(ValueError, match=r"into first cannot be inverted with damping (0|1e\+39); take 0\.01"):
        gptq_initialize(prepared(), lambda: [{"x": correlated(8, 96)}], damping=damping)


def prepared(**scheme: object) -> TwoLayers:
    model = TwoLayers()
    prepare(model, WeightScheme(**{"clip": "mse", **scheme}), FLOAT_ACTIVATIONS)
    return model


def output_error(layer: FakeQuantizedLinear, weight: Tensor, x: Tensor) -> float:
    difference = (layer.fake_quantized_weight().detach() - weight).view(layer.out_features, -1)
    return float((x @ difference.T).square().sum())


@pytest.mark.parametrize("scheme", [{}, {"clip": "learned"}, {"granularity": "per_group", "group_size": 16}])
def test_outputs_are_nearer_than_by_nearest_rounding_and_the_ratio_says_how_much(x: Tensor, scheme) -> None:
    model = prepared(**scheme)
    weight = model.first.weight.detach().clone()
    nearest = output_error(model.first, weight, x)
    ratios = gptq_initialize(model, lambda: iter([{"x": x}]))
    assert list(ratios) == ["first", "second"]
    assert output_error(model.first, weight, x) / nearest == pytest.approx(ratios["first"], rel=0.02)
    assert ratios["first"] < 0.25
    assert ratios["second"] < 0.5
    held_out = correlated(512, 96, seed=0)[256:] + 0.1 * torch.randn(
        256, 96, generator=torch.Generator().manual_seed(9)
    )
    assert output_error(model.first, weight, held_out) < output_error(prepared(**scheme).first, weight, held_out)


def test_second_moments_are_of_the_layers_own_inputs(x: Tensor) -> None:
    model = prepared()
    layers = list(named_layers(model, FakeQuantizedLinear))
    batches = [{"x": x[:200]}, {"x": x[200:]}]
    moments = gptq._second_moments(
        model, [{name: layer} for name, layer in layers], lambda: run_batches(model, batches)
    )
    hidden = x @ model.first.weight.T + model.first.bias
    torch.testing.assert_close(moments["first"], x.T @ x / 512, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments["second"], (hidden.T @ hidden / 512).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2, 0.5])
def test_latents_are_inside_their_bins(x: Tensor, margin: float) -> None:
    model = prepared()
    start = model.first.weight.detach().clone()
    gptq_initialize(model, lambda: iter([{"x": x}]), margin=margin)
    codes, scale = model.first.codes_and_scales()
    steps = model.first.weight.detach() / scale[:, None]
    inside = (steps - codes).abs() <= 0.5 - margin + 1e-5
    assert bool((inside | (codes == -8) | (codes == 7)).all())
    if margin == 0.05:
        moved = (steps - start / scale[:, None]).abs()
        assert 0.2 < float((moved < 1e-6).float().mean()) < 0.9  # the others went no further than the near edge
        assert float(moved.max()) < 2


def test_uncorrelated_inputs_leave_every_weight_where_it_was() -> None:
    model = prepared()
    start = model.first.weight.detach().clone()
    # columns of a scaled orthogonal matrix: H is a multiple of the identity
    x = 10 * torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0)))[0]
    ratios = gptq_initialize(model, lambda: iter([{"x": x}]), margin=0.0)
    assert ratios["first"] == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(model.first.weight.detach(), start)


def test_blocks_are_an_implementation_detail(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).double()
    h = (x.T @ x / len(x)).double() + 0.05 * torch.eye(96).double()
    root = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    results = []
    for block in (1, 7, 64, 1000):
        monkeypatch.setattr(gptq, "_BLOCK", block)
        results.append(gptq_codes(weight, torch.full_like(weight, 0.3), root, -8, 7))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert not torch.equal(results[0], (weight / 0.3).round().clamp(-8, 7))


def test_a_memory_setting_changes_nothing(x: Tensor) -> None:
    """Moments that do not fit are taken in several passes, each of the float model, bit for bit."""
    whole, chunked, calls = prepared(), prepared(), []

    def batches() -> Iterator[dict[str, Tensor]]:
        calls.append(1)
        yield {"x": x}

    ratios = gptq_initialize(whole, batches)
    assert len(calls) == 1
    assert gptq_initialize(chunked, batches, max_bytes=4 * 96**2) == ratios
    assert len(calls) == 3
    assert torch.equal(whole.first.weight, chunked.first.weight)
    assert torch.equal(whole.second.weight, chunked.second.weight)


def test_a_weight_that_layers_share_is_rounded_once_for_the_inputs_of_both(x: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(96, 24), nn.Linear(96, 24)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x[:300]).sum() + self.other(3 * x[300:]).sum()

    tied = Tied()
    prepare(tied, WeightScheme(clip="mse"), FLOAT_ACTIVATIONS)
    alone = nn.Sequential(nn.Linear(96, 24))
    alone[0].weight.data.copy_(tied.one.weight)
    prepare(alone, WeightScheme(clip="mse"), FLOAT_ACTIVATIONS)
    ratios = gptq_initialize(tied, lambda: iter([{"x": x}]))
    both = torch.cat([x[:300], 3 * x[300:]])
    assert (
        ratios["one"]
        == ratios["other"]
        == pytest.approx(gptq_initialize(alone, lambda: iter([{"input": both}]))["0"], rel=1e-4)
    )
    assert torch.equal(tied.one.codes_and_scales()[0], alone[0].codes_and_scales()[0])


def test_inputs_that_never_vary_do_not_break_it() -> None:
    model = prepared()
    x = torch.zeros(64, 96)
    x[:, 3] = 1.0
    gptq_initialize(model, lambda: iter([{"x": x}]))
    assert bool(torch.isfinite(model.first.weight).all())
    dead = prepared()
    gptq_initialize(dead, lambda: iter([{"x": torch.zeros(64, 96)}]))
    assert bool(torch.isfinite(dead.first.weight).all())


def test_wrong_use_is_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match="prepare it first"):
        gptq_initialize(TwoLayers(), lambda: [])
    with pytest.raises(ValueError, match="no input of first was seen"):
        gptq_initialize(prepared(), lambda: [])
    with pytest.raises(ValueError, match=r"margin is 0\.6; it must be within 0 and 0\.5"):
        gptq_initialize(prepared(), lambda: [], margin=0.6)
    with pytest.raises(ValueError, match="the input of first is not finite"):
        gptq_initialize(prepared(), lambda: [{"x": x * float("nan")}])
