"""Measurements: the right samples, counts and intervals, and the loss over the noise level."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fbqat_hub.evaluation.features import EXTRACTOR, OpenMojiFeatures, extract
from fbqat_hub.evaluation.metrics import frechet_distance, psnr, ssim
from fbqat_hub.evaluation.suite import (
    NotMeasurableError,
    features_of,
    measure,
    measure_distance,
    of_samples,
    of_timesteps,
)
from fbqat_hub.pictures import read_picture


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """44 pictures and noisier copies of them; the first pair is equal."""
    folder, generator = tmp_path_factory.mktemp("noisy"), torch.Generator().manual_seed(0)
    files: tuple[list[Path], list[Path]] = ([], [])
    for index in range(44):
        picture = torch.rand(3, 16, 16, generator=generator)
        copy = picture + (0.1 * torch.randn(3, 16, 16, generator=generator) if index else 0)
        for number, pixels in enumerate((picture, copy)):
            path = folder / f"{number}-{index}.png"
            levels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(levels).save(path)
            files[number].append(path)
    return files


def stacked(files: list[Path]) -> torch.Tensor:
    return torch.stack([read_picture(file) for file in files]).float() / 255


def test_paired_metrics_are_means_over_the_pairs_and_equal_pairs_have_no_psnr(noisy) -> None:
    a, b = map(stacked, noisy)
    found = measure("psnr", noisy[0], references=noisy[1])
    assert (found.n, found.extra) == (43, {"equal": 1})
    assert found.value == pytest.approx(psnr(a, b)[1:].mean().item())
    assert found.interval[0] < found.value < found.interval[1]
    similar = measure("ssim", noisy[0], references=noisy[1])
    assert (similar.n, similar.extra) == (44, {})
    assert similar.value == pytest.approx(ssim(a, b).mean().item())


def test_what_the_pictures_do_not_give_says_why(noisy, tmp_path: Path) -> None:
    with pytest.raises(NotMeasurableError, match="all 44 pairs are equal, and the PSNR of equal pictures is infinite"):
        measure("psnr", noisy[0], references=noisy[0])
    with pytest.raises(NotMeasurableError, match="at least 2 pictures in each; there are 1 and 44"):
        measure("fd", noisy[0][:1], references=noisy[1])
    Image.new("RGB", (24, 10)).save(tmp_path / "small.png")
    with pytest.raises(NotMeasurableError, match="pictures of 24 x 10 pixels; SSIM needs 11 on each side"):
        measure("ssim", [tmp_path / "small.png"], references=[tmp_path / "small.png"])


def test_distance_is_on_the_named_extractor_and_says_how_many_references(noisy) -> None:
    features = [features_of("fd", files) for files in noisy]
    expected = [extract(OpenMojiFeatures.load(), stacked(files)) for files in noisy]
    torch.testing.assert_close(features, expected)
    found = measure_distance("fd", *features)
    assert found.value == pytest.approx(frechet_distance(*expected))
    assert (found.n, found.spread, found.extra) == (44, None, {"extractor": EXTRACTOR})
    assert found.interval[0] <= found.value <= found.interval[1]
    assert measure_distance("fd", features[0], features[1][:30]).extra["n_reference"] == 30


def test_loss_over_the_noise_level_has_equal_bins_from_little_noise_to_much() -> None:
    times = [float(time) for time in range(100)]
    bins = of_timesteps([time**2 for time in reversed(times)], list(reversed(times)))
    assert [(row["low"], row["high"], row["n"]) for row in bins] == [(10 * i, 10 * i + 9, 10) for i in range(10)]
    assert bins[3]["value"] == pytest.approx(sum(time**2 for time in range(30, 40)) / 10)
    assert all(row["interval"][0] < row["value"] < row["interval"][1] for row in bins)


def test_a_model_of_four_steps_has_a_bin_for_each() -> None:
    times = [1.0, 0.25, 0.5, 0.75] * 6
    bins = of_timesteps([2 * time for time in times], times)
    assert [(row["low"], row["high"], row["value"], row["n"]) for row in bins] == [
        (time, time, 2 * time, 6) for time in (0.25, 0.5, 0.75, 1.0)
    ]


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(ValueError, match="no pictures"):
        of_samples([])
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        of_samples([1.0, float("nan")])
    alone = of_samples([3.0])
    assert (alone.value, alone.n, alone.spread, alone.interval) == (3.0, 1, None, None)
