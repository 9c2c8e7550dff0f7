"""One function gives what is stored, whoever asks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import ActivationScheme, FakeQuantizedLinear, WeightScheme, quantize_weight
from fbqat_hub.quantization import clip as clip_module
from fbqat_hub.quantization.clip import CLIPS, mse_clip
from fbqat_hub.quantization.quantize import grouped

GRANULARITIES: dict[str, dict[str, Any]] = {
    "per_tensor": {"granularity": "per_tensor"},
    "per_channel": {},
    "per_group": {"granularity": "per_group", "group_size": 8},
}


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_weight_gets_what_a_new_layer_of_it_stores(weight: Tensor, granularity: str, clip: Any, bits: int) -> None:
    scheme = WeightScheme(bits=bits, clip=clip, **GRANULARITIES[granularity])
    linear = nn.Linear(20, 6)
    linear.weight.data = weight.clone()
    layer = FakeQuantizedLinear(linear, scheme, ActivationScheme())
    for found in (quantize_weight(weight, scheme), quantize_weight(weight[:, :, None, None], scheme)):
        assert all(torch.equal(*pair) for pair in zip(found, layer.codes_and_scales(), strict=True))
    codes, scales = found
    assert (codes.dtype, codes.shape, scales.dtype) == (torch.int8, (6, 20), torch.float32)
    assert scales.shape == ((6, 5) if granularity == "per_group" else (6,))  # groups of 4: 8 does not divide 20
    real = codes * (scales.repeat_interleave(4, 1) if granularity == "per_group" else scales[:, None])
    assert torch.equal(real, layer.fake_quantized_weight().detach())


def test_it_changes_nothing_and_takes_a_clip_and_a_width(weight: Tensor) -> None:
    before, scheme = weight.clone(), WeightScheme(clip="mse")
    clip = mse_clip(grouped(weight, scheme), 6)
    codes, scales = quantize_weight(weight, scheme, clip=clip, bit_width=6)
    assert torch.equal(scales, clip[:, 0] / 31)
    assert torch.equal(codes, (weight / scales[:, None]).round().clamp(-32, 31).to(torch.int8))
    assert torch.equal(weight, before)
    assert not scales.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_any_float_dtype_counts_as_the_float32_it_is(weight: Tensor, dtype: torch.dtype) -> None:
    expected = quantize_weight(weight.to(dtype).float(), WeightScheme())
    found = quantize_weight(weight.to(dtype), WeightScheme())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refused(weight: Tensor, bad: float) -> None:
    with pytest.raises(ValueError, match=r"shape \(0, 4\): there is nothing to quantize"):
        quantize_weight(torch.zeros(0, 4), WeightScheme())
    with pytest.raises(ValueError, match="at most 8 bits"):
        quantize_weight(weight, WeightScheme(bits=9))
    with pytest.raises(ValueError, match="17 inputs: no even number from 6 to 12"):
        quantize_weight(weight[:, :17], WeightScheme(granularity="per_group", group_size=12))
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(weight, WeightScheme())


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_rows_are_taken_some_at_a_time_and_nothing_depends_on_how_many(granularity, clip, monkeypatch) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    scheme = WeightScheme(clip=clip, **GRANULARITIES[granularity])
    given = CLIPS["mse"](grouped(weight, scheme)).value(grouped(weight, scheme), 4)
    whole = [quantize_weight(weight, scheme), quantize_weight(weight, scheme, clip=given)]
    monkeypatch.setattr(clip_module, "_BLOCK", 5 * 128)
    parts = [quantize_weight(weight, scheme), quantize_weight(weight, scheme, clip=given)]
    for mine, theirs in zip(parts, whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_beside_the_codes_there_is_no_memory_of_the_weights_size(monkeypatch) -> None:
    from fbqat_hub.training.footprint import Storages  # brings diffusers

    weight = torch.randn(1024, 128).bfloat16()
    monkeypatch.setattr(clip_module, "_BLOCK", 5 * 128)
    with Storages() as storages:
        quantize_weight(weight, WeightScheme(clip="max_abs"))
    assert storages.peak < 3.5 * weight.numel()  # 2 bytes of the weight itself, one of a code
