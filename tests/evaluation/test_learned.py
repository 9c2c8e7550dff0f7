"""Metrics on published networks: CLIP with random weights in full, the others up to their libraries' door."""

import ast
import importlib.util
import string
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from fbqat_hub.evaluation import learned


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for index, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (40 + 8 * index, 48), colour).save(folder / f"{index}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of true classes and random weights."""
    folder = tmp_path_factory.mktemp("clip")
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    vocabulary |= {f"{letter}</w>": index for index, letter in enumerate(string.ascii_lowercase, 2)}
    torch.manual_seed(2)
    config = CLIPConfig(
        text_config={
            **width, "vocab_size": 28, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={**width, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(image_processor, CLIPTokenizer(vocabulary, [])).save_pretrained(folder)
    return folder


def test_clip_score_is_the_scaled_cosine_of_clips_own_embeddings(files, tiny_clip, monkeypatch) -> None:
    monkeypatch.setattr(learned, "CLIP_SCORE_MODEL", str(tiny_clip))
    prompts = ["a b", "c d e f g h i j k", "z"]  # the second is longer than the text encoder takes
    scores = learned.clip_scores(files, prompts)
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    for file, prompt, score in zip(files, prompts, scores, strict=True):
        given = processor(text=prompt, images=Image.open(file), return_tensors="pt", truncation=True, max_length=6)
        cosine = model(**given).logits_per_image.item() / model.logit_scale.exp().item()
        assert score == pytest.approx(max(0, 100 * cosine), abs=1e-3)
    assert max(scores) > 0


def test_clip_features_are_the_embeddings_that_are_not_normalized(files, tiny_clip, monkeypatch) -> None:
    monkeypatch.setattr(learned, "CLIP_FID_MODEL", str(tiny_clip))
    features = learned.clip_features(files)
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    for file, row in zip(files, features, strict=True):
        pixels = processor.image_processor(images=Image.open(file), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(row, model.get_image_features(pixels).pooler_output[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("module", "measure", "says"),
    [
        ("cleanfid.features", learned.inception_features, "FID needs cleanfid"),
        ("piq", learned.clip_iqa_scores, "CLIP-IQA needs piq"),
        ("lpips", lambda files: learned.lpips_distances(files, files), "LPIPS needs lpips"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(module, measure, says, files, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{says}, which cannot be imported .*pip install 'fbqat-hub\[metrics\]'"):
        measure(files)


def test_unreachable_weights_are_named(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(learned, "CLIP_SCORE_MODEL", str(tmp_path / "missing"))
    with pytest.raises(OSError, match=r"CLIP score cannot get its weights from .*missing .*go online .*--metrics"):
        learned.clip_scores(files, ["a"] * 3)


STAND_IN = """
import sys
class Model:
    def score(self, prompt, image):
        return len(prompt) + float(image.split("/")[-1][0]) / 10
def load(name, device):
    print("load checkpoint from somewhere")
    if device == "broken":
        raise OSError("no network")
    return Model()
"""


def test_image_reward_runs_in_the_python_that_is_named(files, tmp_path, monkeypatch) -> None:
    """The other Python here is this one, with a stand-in for image-reward."""
    monkeypatch.setenv(learned.REWARD_PYTHON, sys.executable)
    (tmp_path / "ImageReward.py").write_text(STAND_IN)
    (tmp_path / "torch.py").write_text("import contextlib\nno_grad = contextlib.nullcontext\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert learned.image_rewards(files, ["a", "bb", "ccc"]) == pytest.approx([1.0, 2.1, 3.2])
    with pytest.raises(OSError, match=r"gave no scores .OSError: no network"):
        learned.image_rewards(files, ["a"] * 3, "broken")
    (tmp_path / "ImageReward.py").write_text("raise ImportError('cannot import name apply_chunking_to_forward')")
    with pytest.raises(ImportError, match=r"cannot import .*apply_chunking.*FBQAT_IMAGE_REWARD_PYTHON"):
        learned.image_rewards(files, ["a"] * 3)
    monkeypatch.setenv(learned.REWARD_PYTHON, str(tmp_path / "no-python"))
    with pytest.raises(ImportError, match="no-python, which FBQAT_IMAGE_REWARD_PYTHON names, cannot be run"):
        learned.image_rewards(files, ["a"] * 3)


@pytest.mark.parametrize(
    ("package", "file", "function", "used"),
    [
        ("cleanfid", "features.py", "build_feature_extractor", ["mode", "device", "use_dataparallel"]),
        (
            "cleanfid", "fid.py", "get_files_features",
            ["l_files", "model", "num_workers", "batch_size", "device", "mode", "description"],
        ),
        ("lpips", "lpips.py", "LPIPS.__init__", ["net", "version", "verbose"]),
        ("lpips", "lpips.py", "LPIPS.forward", ["in0", "in1", "normalize"]),
        ("piq", "clip_iqa.py", "CLIPIQA.__init__", ["data_range"]),
        ("ImageReward", "utils.py", "load", ["name", "device"]),
        ("ImageReward", "ImageReward.py", "ImageReward.score", ["prompt", "image"]),
    ],
)  # fmt: skip
def test_what_is_called_takes_what_it_is_given(package: str, file: str, function: str, used: list[str]) -> None:
    """Read from the installed source, as some of these do not import beside every torchvision or transformers."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(found.origin).parent / file).read_text())
    *owner, name = function.split(".")
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner[0]) if owner \
        else tree.body  # fmt: skip
    (definition,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    arguments = [argument.arg for argument in definition.args.args if argument.arg != "self"]
    assert set(used) <= set(arguments)
    required = arguments[: len(arguments) - len(definition.args.defaults)]
    assert set(required) <= set(used)


def test_the_worker_imports_nothing_of_this_package() -> None:
    source = Path(learned.__file__).with_name("image_reward_worker.py").read_text()
    names = [node.names[0].name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    froms = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert sorted(names + froms) == ["ImageReward", "json", "sys", "torch", "typing"]
