"""The extractor that ships: it loads strictly, is small, and a Fréchet distance on it grows with damage."""

import colorsys
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file, save_file

from fbqat_hub.evaluation.features import DIMENSIONS, EXTRACTOR, WEIGHTS, OpenMojiFeatures, extract, training_figures
from fbqat_hub.evaluation.metrics import frechet_distance


def drawings(count: int = 96) -> list[Image.Image]:
    """Outlined shapes in many colours, places and sizes: a stand-in for emoji that needs no data set."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        picture = Image.new("RGB", (128, 128), "white")
        draw = ImageDraw.Draw(picture)
        for _ in range(random.integers(1, 4)):
            x, y, radius = random.uniform(30, 98), random.uniform(30, 98), random.uniform(14, 44)
            colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(random.uniform(), 0.8, random.uniform(0.4, 1)))
            corners, turn = int(random.integers(3, 9)), random.uniform(0, math.tau)
            angles = [turn + math.tau * k / corners for k in range(corners)]
            outline = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
            draw.polygon(outline, fill=colour, outline="black", width=4)
        pictures.append(picture.resize((64, 64), Image.Resampling.LANCZOS))
    return pictures


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def model() -> OpenMojiFeatures:
    return OpenMojiFeatures.load()


@pytest.fixture(scope="module")
def clean() -> list[Image.Image]:
    return drawings()


def damaged(pictures: list[Image.Image], kind: str, strength: float) -> torch.Tensor:
    images = tensor(pictures)
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + strength * noise).clamp(0, 1)
    if kind == "blur":
        return tensor([picture.filter(ImageFilter.GaussianBlur(strength)) for picture in pictures])
    return (images * (strength - 1)).round() / (strength - 1)  # quantised to `strength` levels


@pytest.mark.parametrize(
    ("kind", "strengths"),
    [("noise", (0.02, 0.05, 0.1, 0.2, 0.4)), ("blur", (0.5, 1, 1.5, 2, 3)), ("levels", (32, 16, 8, 4, 2))],
)
def test_the_distance_grows_with_damage(
    model: OpenMojiFeatures, clean: list[Image.Image], kind: str, strengths: tuple
) -> None:
    reference = extract(model, tensor(clean))
    distances = [frechet_distance(reference, extract(model, damaged(clean, kind, strength))) for strength in strengths]
    assert all(later > 1.2 * earlier for earlier, later in itertools.pairwise(distances)), distances
    assert frechet_distance(reference, reference) < 1e-3 * distances[0]


def test_the_file_is_small_half_precision_and_says_how_it_was_made(model: OpenMojiFeatures) -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}
    figures = training_figures()
    assert figures["extractor"] == EXTRACTOR
    assert figures["retrieval_held_out"] > 0.9
    assert "CC BY-SA" in figures["attribution"]
    assert "/" not in figures["command"]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_extraction_does_not_depend_on_the_batch_and_takes_any_size(
    model: OpenMojiFeatures, clean: list[Image.Image]
) -> None:
    images = tensor(clean[:7])
    features = extract(model, images, batch_size=3)
    assert features.shape == (7, DIMENSIONS)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, extract(model, images, batch_size=7), rtol=1e-4, atol=1e-4)
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    same = extract(model, larger)
    assert (same - features).norm() < 0.2 * (features - features.mean(dim=0)).norm()


def test_wrong_input_and_wrong_files_are_refused(model: OpenMojiFeatures, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(3, 64, 64\)"):
        model(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="empty"):
        extract(model, torch.zeros(0, 3, 64, 64))
    with pytest.raises(FileNotFoundError, match=r"fbqat_hub\.training\.features"):
        OpenMojiFeatures.load(tmp_path / "absent.safetensors")
    tensors = load_file(WEIGHTS)
    del tensors["scale"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(RuntimeError, match=r'Missing key.*"scale"'):
        OpenMojiFeatures.load(tmp_path / "short.safetensors")
