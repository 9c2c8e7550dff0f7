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
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_map

from fbqat_hub.families import FAMILIES, get_family
from fbqat_hub.families.sana import Sana
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training import cache, shards
from fbqat_hub.training.cache import build_cache, cache_key
from fbqat_hub.training.captioned import load_pictures
from fbqat_hub.training.pictures import picture_of
from tests.conftest import CALL, CAPTIONS, TRAINED, call_of


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


def tensors_of(split: cache.CachedSplit, indices: Tensor) -> list[Tensor]:
    latents, conditioning = split.batch(indices)
    return [latents, *conditioning.values()]


def test_splits_are_cut_from_train_and_share_nothing(data: datasets.DatasetDict) -> None:
    assert {split: len(rows) for split, rows in data.items()} == {"train": 10, "validation": 1, "test": 1}
    assert sorted(caption for rows in data.values() for caption in rows["caption"]) == sorted(CAPTIONS)


@torch.no_grad()
def test_a_sample_is_what_the_pipeline_makes_of_it(pipeline, data, tmp_path: Path) -> None:
    family = get_family("sana")
    split = build_cache(pipeline, family, data, (32, 32), CALL, tmp_path)["train"]
    assert split.captions == list(data["train"]["caption"])
    latents, conditioning = split.batch(torch.tensor([7, 2]))
    expected = family.encode_prompts(pipeline, [split.captions[7], split.captions[2]], CALL)
    for name, value in expected.items():
        assert torch.allclose(conditioning[name], value, atol=1e-6), name
    picture = torch.frombuffer(bytearray(picture_of(data["train"][7]["image"], "7").tobytes()), dtype=torch.uint8)
    pixels = picture.view(32, 32, 3).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(latents[:1], family.encode_images(pipeline, pixels), atol=1e-5)


def test_second_build_reads_from_disk(pipeline, data, tmp_path: Path, encoded: list[int]) -> None:
    first = build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path)
    assert sum(encoded) == 12
    again = build_cache(None, get_family("sana"), data, (32, 32), CALL, tmp_path)
    assert sum(encoded) == 12
    everything = torch.arange(10)
    assert torch.equal(first["train"].batch(everything)[0], again["train"].batch(everything)[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_build_goes_on(error, pipeline, data, tmp_path: Path, encoded, monkeypatch) -> None:
    """Stopped while the third of four shards is written: the two before it are kept, nothing half-written stays."""
    monkeypatch.setattr(shards, "BATCH", 3)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    whole = build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path / "whole")
    encoded.clear()
    write = shards.save_file

    def stopping(tensors: Any, path: Path, metadata: Any) -> None:
        if "pictures-000000006" in path.name:
            path.write_bytes(b"half")
            raise error
        write(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", stopping)
        with pytest.raises(type(error)):
            build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path / "cut")
    kept = sorted(path.name for path in (tmp_path / "cut" / "train").iterdir())
    assert kept == ["pictures-000000000.safetensors", "pictures-000000003.safetensors"]
    encoded.clear()
    resumed = build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path / "cut")
    assert sum(encoded) == 6  # rows 6 to 9, and one of each other split
    everything = torch.arange(10)
    of_resumed, of_whole = (tensors_of(splits["train"], everything) for splits in (resumed, whole))
    assert all(map(torch.equal, of_resumed, of_whole))


def test_a_caption_is_encoded_and_kept_once(pipeline, pictures: Path, fbqat_cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "twice")
    captions = ["red", "red", "blue"] * 4
    rows = [{"file_name": f"{index}.png", "caption": caption} for index, caption in enumerate(captions)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_pictures({"path": str(folder), "cache_dir": str(fbqat_cache / "datasets")}, 32)
    split = build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path / "encoded")["train"]
    with safe_open(tmp_path / "encoded" / "train" / "captions-000000000.safetensors", "pt") as file:
        assert file.get_tensor("encoder_attention_mask").shape[0] == 2
    _, conditioning = split.batch(torch.arange(10))
    for index, caption in enumerate(split.captions):
        expected = get_family("sana").encode_prompts(pipeline, [caption], CALL)["encoder_hidden_states"][0]
        assert torch.allclose(conditioning["encoder_hidden_states"][index], expected, atol=1e-6), caption


@pytest.mark.parametrize("name", [*TRAINED, *(name for name in FAMILIES if name not in TRAINED)])
@torch.no_grad()
def test_half_precision_keeps_half_and_no_padding(name: str, teacher_of: Any, data: Any, tmp_path: Path) -> None:
    """Latents and the rows of the text as bf16 rounds them, masks as they are; padded with zeros again."""
    family, pipeline = get_family(name), load_pipeline(teacher_of(name))
    pipeline.set_progress_bar_config(disable=True)
    call = call_of(name, pipeline)
    full, half = (
        build_cache(pipeline, family, data, (32, 32), call, tmp_path / str(dtype), dtype=dtype)["train"]
        for dtype in (None, torch.bfloat16)
    )
    some = torch.tensor([3, 0, 9])
    (latents, exact), (rounded, compact) = full.batch(some), half.batch(some)
    assert torch.equal(rounded, latents.bfloat16().float())
    assert exact.keys() == compact.keys()
    text, mask = exact.pop("encoder_hidden_states"), next((v for k, v in exact.items() if k.endswith("_mask")), None)
    seen = torch.ones(text.shape[:2]) if mask is None else mask
    assert torch.equal(compact.pop("encoder_hidden_states"), text.bfloat16().float() * seen.bool()[..., None])
    for key, value in exact.items():
        wanted = value.bfloat16().float() if key == "pooled_projections" else value
        assert torch.equal(compact[key], wanted), key
    if mask is not None:
        with safe_open(tmp_path / "torch.bfloat16" / "train" / "captions-000000000.safetensors", "pt") as file:
            assert file.get_tensor("encoder_hidden_states").shape[0] < mask.numel() / mask.shape[0] * 10


def test_full_precision_keeps_what_was_computed(pipeline, data, tmp_path: Path, monkeypatch) -> None:
    """To the bit, what lies behind the mask included: results of a run do not change."""
    made, encode = [], Sana.encode_prompts
    monkeypatch.setattr(Sana, "encode_prompts", lambda *args: [made.append(encode(*args)), made[-1]][1])
    split = build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path)["train"]
    _, conditioning = split.batch(torch.arange(10))
    assert (made[0]["encoder_attention_mask"] == 0).any()
    for name, value in made[0].items():
        assert torch.equal(conditioning[name], value), name
        assert conditioning[name].dtype == value.dtype


def test_a_cache_of_other_data_is_refused(pipeline, data, tmp_path: Path) -> None:
    build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path)
    data["train"] = data["train"].map(lambda row: {"caption": row["caption"] + " square"}, keep_in_memory=True)
    with pytest.raises(ValueError, match="train was encoded from other data under the same name; delete it"):
        build_cache(pipeline, get_family("sana"), data, (32, 32), CALL, tmp_path)


def test_picture_that_is_not_square_is_cut_not_squeezed(pipeline, tmp_path: Path, monkeypatch) -> None:
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    rows = datasets.Dataset.from_dict({"image": [wide], "caption": ["blue"]})
    rows = rows.cast_column("image", datasets.Image())
    seen = []
    encode = Sana.encode_images
    monkeypatch.setattr(Sana, "encode_images", lambda *args: [seen.append(args[2]), encode(*args)][1])
    build_cache(pipeline, get_family("sana"), dict.fromkeys(cache.SPLITS, rows), (32, 32), CALL, tmp_path)
    assert seen[0][0, :, 16, 16].tolist() == [-1, -1, 1]
    assert seen[0][0, 0].max() == -1  # no red of the sides is left


def test_key_depends_on_all_that_is_encoded(tiny_sana: Path, pictures: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(tiny_sana, tmp_path / "teacher")
    images = shutil.copytree(pictures, tmp_path / "images")
    dataset = {"path": str(images)}
    given: dict[str, Any] = {"teacher": str(teacher), "dataset": dataset, "size": (32, 32), "generation": CALL}
    key = cache_key(**given)
    assert key == cache_key(**given)
    assert key == cache_key(**given | {"dataset": {**dataset, "skip": 0.5}})  # nothing that was encoded is lost
    others = [
        cache_key(**{**given, change: value})
        for change, value in (
            ("teacher", "owner/name"),
            ("dataset", {"path": "openmoji"}),
            ("size", 64),
            ("generation", {**CALL, "max_sequence_length": 9}),
            ("dtype", torch.bfloat16),
        )
    ]
    with (images / "train" / "metadata.jsonl").open("a") as file:
        file.write("\n")
    others.append(cache_key(**given))
    (teacher / "tokenizer" / "tokenizer.json").write_text("{}")
    others.append(cache_key(**given))
    assert len({key, *others}) == 8


@pytest.mark.parametrize(
    "named",
    [
        "{}/a.parquet",
        "{}/*.parquet",
        ["{}/a.parquet", "{}/none.parquet"],
        {"train": ["{}/a.parquet"], "test": "{}/a.parquet"},
        {"train": "zip://*.png::{}/a.parquet"},
    ],
)
def test_key_depends_on_the_data_files(named: Any, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("old")
    files = tree_map(lambda text: text.format(tmp_path), named)
    given: dict[str, Any] = {"teacher": "owner/name", "size": (32, 32), "generation": CALL}
    for place in ({"path": "parquet"}, {"path": "parquet", "data_dir": str(tmp_path)}):
        keys = []
        for text in ("one", "three"):
            (tmp_path / "a.parquet").write_text(text)
            keys.append(cache_key(dataset={**place, "data_files": files}, **given))
        assert keys[0] != keys[1]


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


def test_a_table_without_rows_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl has no rows; write one for each picture, e\.g\. \{"):
        load_pictures({"path": str(tmp_path)}, 32)


def test_a_folder_of_texts_alone_is_said_to_hold_no_pictures(fbqat_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("a red heart")
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no pictures \(\.png, .*\); give a folder of them"):
        load_pictures({"path": str(tmp_path), "cache_dir": str(fbqat_cache / "datasets")}, 32)
