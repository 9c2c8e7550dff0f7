"""The cache: encoded once, gone on with after an interruption, another one for other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from fbqat_hub.families import get_family
from fbqat_hub.families.sana import Sana
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training import cache
from fbqat_hub.training.cache import build_cache, cache_key, load_pictures
from tests.conftest import CALL, CAPTIONS


@pytest.fixture
def pipeline(tiny_sana: Path) -> Any:
    return load_pipeline(tiny_sana)


@pytest.fixture
def data(recipe_fields: dict[str, Any]) -> datasets.DatasetDict:
    return load_pictures(recipe_fields["dataset"], 32)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches of pictures that were encoded."""
    sizes, encode = [], Sana.encode_images
    monkeypatch.setattr(
        Sana,
        "encode_images",
        lambda self, pipeline, pixels: [sizes.append(len(pixels)), encode(self, pipeline, pixels)][1],
    )
    return sizes


def test_splits_are_cut_from_train_and_share_nothing(data: datasets.DatasetDict) -> None:
    assert {split: len(rows) for split, rows in data.items()} == {"train": 10, "validation": 1, "test": 1}
    assert sorted(caption for rows in data.values() for caption in rows["caption"]) == sorted(CAPTIONS)


@torch.no_grad()
def test_a_sample_is_what_the_pipeline_makes_of_it(pipeline, data, tmp_path: Path) -> None:
    family = get_family("sana")
    split = build_cache(pipeline, family, data, 32, CALL, tmp_path)["train"]
    assert split.captions == list(data["train"]["caption"])
    latents, conditioning = split.batch(torch.tensor([7, 2]))
    expected = family.encode_prompts(pipeline, [split.captions[7], split.captions[2]], CALL)
    for name, value in expected.items():
        assert torch.allclose(conditioning[name], value, atol=1e-6), name
    picture = torch.frombuffer(bytearray(data["train"][7]["image"].convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = picture.view(32, 32, 3).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(latents[:1], family.encode_images(pipeline, pixels), atol=1e-5)


def test_second_build_reads_from_disk(pipeline, data, tmp_path: Path, encoded: list[int]) -> None:
    first = build_cache(pipeline, get_family("sana"), data, 32, CALL, tmp_path)
    assert sum(encoded) == 12
    again = build_cache(None, get_family("sana"), data, 32, CALL, tmp_path)
    assert sum(encoded) == 12
    everything = torch.arange(10)
    assert torch.equal(first["train"].batch(everything)[0], again["train"].batch(everything)[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_build_goes_on(error, pipeline, data, tmp_path: Path, encoded, monkeypatch) -> None:
    """Stopped while the third of four shards is written: the two before it are kept, nothing half-written stays."""
    monkeypatch.setattr(cache, "SHARD", 3)
    whole = build_cache(pipeline, get_family("sana"), data, 32, CALL, tmp_path / "whole")
    encoded.clear()
    write = cache.save_file

    def stopping(tensors: Any, path: Path) -> None:
        if "000000006" in path.name:
            path.write_bytes(b"half")
            raise error
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", stopping)
        with pytest.raises(type(error)):
            build_cache(pipeline, get_family("sana"), data, 32, CALL, tmp_path / "cut")
    kept = sorted(path.name for path in (tmp_path / "cut" / "train").iterdir())
    assert kept == ["000000000.safetensors", "000000003.safetensors"]
    encoded.clear()
    resumed = build_cache(pipeline, get_family("sana"), data, 32, CALL, tmp_path / "cut")
    assert sum(encoded) == 6  # rows 6 to 9, and one of each other split
    everything = torch.arange(10)
    assert torch.equal(resumed["train"].batch(everything)[0], whole["train"].batch(everything)[0])


def test_picture_that_is_not_square_is_cut_not_squeezed(pipeline, tmp_path: Path, monkeypatch) -> None:
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    rows = datasets.Dataset.from_dict({"image": [wide], "caption": ["blue"]})
    rows = rows.cast_column("image", datasets.Image())
    seen = []
    encode = Sana.encode_images
    monkeypatch.setattr(Sana, "encode_images", lambda *args: [seen.append(args[2]), encode(*args)][1])
    build_cache(pipeline, get_family("sana"), dict.fromkeys(cache.SPLITS, rows), 32, CALL, tmp_path)
    assert seen[0][0, :, 16, 16].tolist() == [-1, -1, 1]
    assert seen[0][0, 0].max() == -1  # no red of the sides is left


def test_key_depends_on_all_that_is_encoded(tiny_sana: Path, pictures: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(tiny_sana, tmp_path / "teacher")
    images = shutil.copytree(pictures, tmp_path / "images")
    given: dict[str, Any] = {"teacher": str(teacher), "dataset": {"path": str(images)}, "size": 32, "generation": CALL}
    key = cache_key(**given)
    assert key == cache_key(**given)
    others = [
        cache_key(**{**given, change: value})
        for change, value in (
            ("teacher", "owner/name"),
            ("dataset", {"path": "openmoji"}),
            ("size", 64),
            ("generation", {**CALL, "max_sequence_length": 9}),
        )
    ]
    with (images / "train" / "metadata.jsonl").open("a") as file:
        file.write("\n")
    others.append(cache_key(**given))
    (teacher / "tokenizer" / "tokenizer.json").write_text("{}")
    others.append(cache_key(**given))
    assert len({key, *others}) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "text"}, "has no column 'text'; it has .*caption.* dataset.caption_column"),
        ({"image_column": "picture"}, "has no column 'picture'; it has .*image.* dataset.image_column"),
    ],
)
def test_wrong_column_lists_the_columns(changes: dict[str, str], message: str, recipe_fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        load_pictures({**recipe_fields["dataset"], **changes}, 32)


@pytest.mark.parametrize(
    ("folder", "message"), [("test", "has no split 'train'; it has test"), ("train", "has 1 training pictures")]
)
def test_too_little_data_is_said(folder: str, message: str, fbqat_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "few" / folder).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "few" / folder / "0.png")
    line = json.dumps({"file_name": "0.png", "caption": "black"})
    (tmp_path / "few" / folder / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        load_pictures({"path": str(tmp_path / "few"), "cache_dir": str(fbqat_cache / "datasets")}, 32)
