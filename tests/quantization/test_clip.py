"""The MSE clip is near the best there is, for every kind of row; the clips by their names."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fbqat_hub.files import shipped
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


def searched_clip(rows: Tensor, bits: float) -> Tensor:
    """The reference: 69 looks at every value, at steps of 2% of max|W| and then of 0.4% around the best."""
    largest = max_abs(rows)

    def best(centre: Tensor, offsets: list[float]) -> Tensor:
        clips = torch.stack([centre + offset * largest for offset in offsets])
        errors = torch.stack([(fake_quantize(rows, clip, bits) - rows).square().sum(-1) for clip in clips])
        return clips.squeeze(-1).gather(0, errors.argmin(0, keepdim=True)).view_as(centre)

    return best(best(largest, [step / 50 for step in range(10, -50, -1)]), [step / 250 for step in range(-4, 5)])


@pytest.mark.parametrize("shape", [(4, 6000), (12, 1152), (96, 32)], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 4.25, 8])
def test_the_squared_error_of_a_search_of_69_looks(bits: float, shape: tuple[int, int]) -> None:
    """To 0.1%; (4, 6000) is counted in bins at 4 bits, the others are looked up."""
    random = torch.Generator().manual_seed(1)
    normal = torch.randn(shape, generator=random)
    outlier = normal.clone()
    outlier[:, 0] = 30.0
    for weight in (normal, normal.sign() * normal.abs().pow(3), outlier):
        reference = float(squared_error(weight, searched_clip(weight, bits), bits).sum())
        for size in (1e-6, 1.0, 1e30):
            clip = mse_clip(weight * size, bits) / size
            assert float(squared_error(weight, clip, bits).sum()) <= reference * 1.001


def test_the_squared_error_on_trained_weights() -> None:
    """Of the teachers that ship: the first rows of every linear layer."""
    ours = reference = 0.0
    for path in sorted(shipped("training/teachers").glob("*/transformer/*.safetensors")):
        for weight in load_file(path).values():
            if weight.ndim == 2:
                rows = weight[:8].float()
                ours += float(squared_error(rows, mse_clip(rows, 4), 4).sum())
                reference += float(squared_error(rows, searched_clip(rows, 4), 4).sum())
    assert 0 < ours <= reference * 1.001


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_odd_rows(bits: float) -> None:
    tiny, huge = 1e-30, 3e38
    odd = torch.tensor(
        [[0.0] * 6, [0.3] * 6, [tiny] * 6, [huge, -huge] * 3, [1.0, 0, 0, 0, 0, 0], [-1.0, 0.5, 0, 0, 0, 0]]
    )
    for weight in (odd, odd[:, :1]):
        clip = mse_clip(weight, bits)
        assert bool(((clip > 0) & torch.isfinite(clip)).all())
        one = torch.tensor([1, 4])  # one value: it lies on the grid
        torch.testing.assert_close(fake_quantize(weight[one], clip[one], bits), weight[one])
    not_finite = torch.tensor([[1.0, torch.nan, torch.inf], [1.0, 0.5, 0.2]])
    assert torch.equal(mse_clip(not_finite, bits)[1:], mse_clip(not_finite[1:], bits))  # refused where it is stored


@pytest.mark.parametrize("shape", [(3, 40000), (700, 96), (40, 5000), (1, 2**17)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(mse_clip(weight, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(5, 6000), (300, 32)], ids=str)
def test_on_a_gpu(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for bits in (4, 8):
        there, here = mse_clip(weight.cuda(), bits), mse_clip(weight, bits)
        assert there.is_cuda
        errors = [float(squared_error(weight, clip, bits).sum()) for clip in (there.cpu(), here)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


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
