"""The metrics as `evaluate` modules: loaded from their folders, equal to the functions behind them."""

from collections.abc import Iterator
from pathlib import Path

import evaluate
import pytest
import torch
from PIL import Image

from fbqat_hub.evaluation.features import OpenMojiFeatures, extract
from fbqat_hub.evaluation.metrics import frechet_distance, psnr, ssim
from fbqat_hub.evaluation.modules import NAMES, folder
from fbqat_hub.pictures import as_tensor, read_picture


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`evaluate` copies a module into its cache before it imports it, and writes what it is given beside."""
    root = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(root / "modules"))
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(root / "metrics"))
        yield


@pytest.fixture
def pictures() -> tuple[list[Image.Image], list[Image.Image]]:
    """Six pictures of noise and of other noise."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.rand(2, 6, 24, 24, 3, generator=generator) * 255).byte().numpy()
    return [Image.fromarray(levels) for levels in made[0]], [Image.fromarray(levels) for levels in made[1]]


def load(name: str) -> evaluate.Metric:
    return evaluate.load(str(folder(name)))


@pytest.mark.parametrize("name", NAMES)
def test_every_module_is_a_folder_that_imports_what_evaluate_looks_for(name: str) -> None:
    lines = (folder(name) / f"{name}.py").read_text().splitlines()
    assert "import datasets" in lines
    assert "import evaluate" in lines


def test_unknown_module() -> None:
    with pytest.raises(ValueError, match=r"no module 'fidd'; there are: .*fid"):
        folder("fidd")


def test_paired_modules_answer_as_the_functions_do(pictures, tmp_path: Path) -> None:
    a, b = (torch.stack([as_tensor(picture) for picture in each]).float() / 255 for each in pictures)
    found = load("psnr").compute(predictions=pictures[0], references=pictures[1])
    assert (found["psnr"], found["n"]) == (pytest.approx(psnr(a, b).mean().item()), 6)
    assert found["interval"][0] < found["psnr"] < found["interval"][1]

    for number, each in enumerate(pictures):
        for index, picture in enumerate(each):
            picture.save(tmp_path / f"{number}-{index}.png")
    paths = [[str(tmp_path / f"{number}-{index}.png") for index in range(6)] for number in (0, 1)]
    found = load("ssim").compute(predictions=paths[0], references=paths[1])
    assert found["ssim"] == pytest.approx(ssim(a, b).mean().item())
    assert load("psnr").compute(predictions=pictures[0], references=pictures[0]) == {
        "psnr": None, "n": 0, "interval": None,
        "why": "all 6 pairs are equal, and the PSNR of equal pictures is infinite",
    }  # fmt: skip


def test_distance_module_names_its_extractor(pictures) -> None:
    found = load("fd").compute(predictions=pictures[0], references=pictures[1])
    a, b = (torch.stack([as_tensor(picture) for picture in each]).float() / 255 for each in pictures)
    model = OpenMojiFeatures.load()
    assert found["fd"] == pytest.approx(frechet_distance(extract(model, a), extract(model, b)))
    assert (found["extractor"], found["n"], found["interval"]) == ("openmoji-cnn-1", 6, None)


def test_distillation_loss_module() -> None:
    student, teacher = [[0.0, 1.0], [2.0, 2.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    found = load("kd_loss").compute(predictions=student, references=teacher, timesteps=[100.0, 900.0, 900.0], bins=2)
    assert (found["kd_loss"], found["n"]) == (1.5, 3)
    assert [(row["low"], row["value"], row["n"]) for row in found["by_timestep"]] == [(100.0, 0.5, 1), (900.0, 2.0, 2)]


@pytest.mark.parametrize(("name", "function"), [("clip_score", "clip_scores"), ("image_reward", "image_rewards")])
def test_prompted_modules_pass_picture_and_prompt_on(name: str, function: str, pictures, monkeypatch) -> None:
    def scores(files: list[Path], prompts: list[str], device: str) -> list[float]:
        levels = [read_picture(file).float().mean().item() for file in files]
        return [level + len(prompt) for level, prompt in zip(levels, prompts, strict=True)]

    monkeypatch.setattr(f"fbqat_hub.evaluation.learned.{function}", scores)
    found = load(name).compute(predictions=pictures[0][:2], references=["a", "bbb"])
    levels = [as_tensor(picture).float().mean().item() for picture in pictures[0][:2]]
    assert found[name] == pytest.approx((levels[0] + 1 + levels[1] + 3) / 2)


def test_module_of_pictures_alone(pictures, monkeypatch) -> None:
    monkeypatch.setattr("fbqat_hub.evaluation.learned.clip_iqa_scores", lambda files, device: [0.25] * len(files))
    assert load("clip_iqa").compute(predictions=pictures[0])["clip_iqa"] == 0.25
