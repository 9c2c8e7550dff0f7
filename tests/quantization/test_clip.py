"""The MSE clip is near the best there is, for every kind of row; the clips by their names."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fbqat_hub.quantization import clip as clips
from fbqat_hub.quantization.clip import CLIPS, max_abs, mse_clip
from fbqat_hub.quantization.fake_quantize import fake_quantize
from fbqat_hub.quantization.scheme import ClipName


def rows(kind: str) -> Tensor:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(6, 400, generator=random)
    if kind == "uniform":
        return torch.rand(6, 400, generator=random) - 0.5
    if kind == "heavy_tailed":
        return normal.sign() * normal.abs().pow(3)
    if kind == "outliers":
        normal[:, 0] = 40.0
    if kind == "short":
        return normal[:, :5]
    if kind == "one_value":
        return torch.full((6, 8), 0.3)
    return normal


def squared_error(weight: Tensor, clip: Tensor, bits: float) -> Tensor:
    return (fake_quantize(weight.double(), clip.double(), bits) - weight.double()).square().mean(-1)


KINDS = ("normal", "uniform", "heavy_tailed", "outliers", "short", "one_value")


@pytest.mark.parametrize("bits", [2, 3, 4, 4.25, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_near_the_brute_force_optimum_and_never_worse_than_max_abs(kind: str, bits: float) -> None:
    weight = rows(kind)
    largest = max_abs(weight)
    found = squared_error(weight, mse_clip(weight, bits), bits)
    # 1e-12: one float32 rounding of a clip that is max|W| itself
    assert bool((found <= squared_error(weight, largest, bits) * (1 + 1e-5) + 1e-12).all())

    ratios = np.geomspace(0.002, 1.3, 3000)
    best = torch.stack([squared_error(weight, largest * ratio, bits) for ratio in ratios]).amin(0)
    power = weight.double().square().mean(-1)
    # the search looks every 0.4% of max|W|, where a row of few values has many narrow minima
    assert bool((found <= best * 1.02 + 1e-5 * power).all())


def test_fewer_bits_clip_more() -> None:
    weight = rows("normal")
    assert bool((mse_clip(weight, 3) < mse_clip(weight, 8)).all())


def test_shape_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search block by block gives the same bits as one by one."""
    weight = rows("normal").view(6, 20, 20)
    whole = mse_clip(weight, 4)
    assert whole.shape == (6, 20, 1)
    monkeypatch.setattr(clips, "_BLOCK", 1)
    assert torch.equal(mse_clip(weight, 4), whole)


def test_a_row_of_zeros_has_a_positive_clip() -> None:
    zeros = torch.zeros(2, 4)
    for clip in (max_abs(zeros), mse_clip(zeros, 4)):
        assert bool((clip > 0).all())
        assert torch.equal(fake_quantize(zeros, clip, 4), zeros)


def test_max_abs_takes_no_gradient() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.5, 0.2]], requires_grad=True)
    assert max_abs(weight).tolist() == [[3.0], [0.5]]
    assert not max_abs(weight).requires_grad


def test_every_name_of_a_scheme_has_its_clip() -> None:
    assert tuple(CLIPS) == get_args(ClipName)


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_found_anew_for_a_width_and_says_which_parameters_were_set(name: str) -> None:
    weight = rows("outliers")
    clip = CLIPS[name](weight)
    set_anew = clip.on_width(weight, 3)
    assert [id(each) for each in set_anew] == [id(each) for each in clip.parameters()]
    expected = max_abs(weight) if name == "max_abs" else mse_clip(weight, 3)
    torch.testing.assert_close(clip.value(weight, 3), expected)
    assert clip.value(weight, 3).requires_grad is (name == "learned")
