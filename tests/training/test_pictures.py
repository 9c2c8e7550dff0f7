"""Pictures of a data set are learned as they are to be looked at, or refused by the name of their file."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fbqat_hub.families import get_family
from fbqat_hub.families.sana import Sana
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.cache import build_cache
from fbqat_hub.training.captioned import load_pictures
from fbqat_hub.training.pictures import picture_of, training_picture, undecoded
from tests.conftest import CALL


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """An imagefolder of one colour each: transparent red, 16-bit grey, CMYK red, and three plain blues."""
    folder = tmp_path / "mixed" / "train"
    folder.mkdir(parents=True)
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.fromarray(np.full((32, 32), 0x8080, np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(folder / "print.jpg", quality=100)
    for number in range(3):
        Image.new("RGB", (32, 32), "blue").save(folder / f"{number}.png")
    rows = [{"file_name": file.name, "caption": file.stem} for file in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder.parent


def loaded(folder: Path, tmp_path: Path) -> datasets.DatasetDict:
    return load_pictures({"path": str(folder), "cache_dir": str(tmp_path / "cache")}, 32)


def test_the_encoder_is_given_what_is_to_be_seen(mixed: Path, tiny_sana: Path, tmp_path: Path, monkeypatch) -> None:
    """Transparency on white, 16-bit grey in 8 bits, CMYK as RGB: the levels of every picture that is encoded."""
    seen: dict[str, list[int]] = {}
    encode = Sana.encode_images

    def recorded(self: Any, pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
        for picture in pixels:
            levels = ((picture + 1) * 127.5).round().int()
            assert (levels == levels[:, :1, :1]).all()
            seen[str(levels[:, 0, 0].tolist())] = []
        return encode(self, pipeline, pixels)

    monkeypatch.setattr(Sana, "encode_images", recorded)
    data = loaded(mixed, tmp_path)
    build_cache(load_pipeline(tiny_sana, torch.float32), get_family("sana"), data, (32, 32), CALL, tmp_path / "encoded")
    colours = np.array([json.loads(key) for key in sorted(seen)])
    expected = np.array([[0, 0, 255], [128, 128, 128], [255, 0, 0], [255, 255, 255]])
    assert colours.shape == expected.shape
    assert np.abs(colours - expected).max() <= 1  # of JPEG


def test_a_damaged_picture_is_named(mixed: Path, tiny_sana: Path, tmp_path: Path) -> None:
    data = (mixed / "train" / "deep.png").read_bytes()
    (mixed / "train" / "deep.png").write_bytes(data[: len(data) // 2])
    rows = loaded(mixed, tmp_path)
    family, pipeline = get_family("sana"), load_pipeline(tiny_sana, torch.float32)
    with pytest.raises(ValueError, match=r"train/deep\.png cannot be read as a picture"):
        build_cache(pipeline, family, rows, (32, 32), CALL, tmp_path / "encoded")


def test_what_cannot_be_used_is_left_out_and_listed(mixed: Path, tiny_sana: Path, tmp_path: Path, capsys) -> None:
    """A damaged picture, a tiny one and one without a caption, of 40; the others are learned with their captions."""
    folder = mixed / "train"
    for number in range(3, 40):
        Image.new("RGB", (32, 32), (6 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:50])
    Image.new("RGB", (40, 8)).save(folder / "7.png")
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".png", ".jpg"))
    rows = [{"file_name": name, "caption": " " if name == "9.png" else name} for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split in ("validation", "test"):
        (mixed / split).mkdir()
        Image.new("RGB", (32, 32)).save(mixed / split / "0.png")
        (mixed / split / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": "black"}))
    data, encoded = loaded(mixed, tmp_path), tmp_path / "encoded"
    family, pipeline = get_family("sana"), load_pipeline(tiny_sana, torch.float32)
    with pytest.raises(ValueError, match=r"3 of the 43 pictures of train cannot be used; dataset.skip is 0.05"):
        build_cache(pipeline, family, data, (32, 32), CALL, encoded, skip=0.05)
    for given in (pipeline, None):  # the second time nothing is encoded
        split = build_cache(given, family, data, (32, 32), CALL, encoded, skip=0.1)["train"]
        assert "3 of 43 pictures of train are left out" in capsys.readouterr().err
        assert split.captions == [name for name in names if name not in ("5.png", "7.png", "9.png")]
    said = (encoded / "train" / "left-out.txt").read_text().splitlines()
    assert [line.partition(".png ")[2].partition(" (")[0] for line in said] == [
        "cannot be read as a picture", "has 40 x 8 pixels; a training picture has at least 16 on each side.",
        "has no caption.",
    ]  # fmt: skip
    latents, _ = split.batch(torch.arange(len(split)))
    row = split.captions.index("20.png")
    alone = torch.tensor([6 * 20, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(latents[row], family.encode_images(pipeline, alone)[0], atol=1e-5)


def test_a_format_that_is_not_read_is_named(tiny_sana: Path, tmp_path: Path) -> None:
    """What a phone's camera makes, for one; it is not passed over."""
    for name in ("a.png", "b.png", "c.png", "d.heic"):
        Image.new("RGB", (32, 32), "blue").save(tmp_path / name, format="PNG")
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / "d.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    family, pipeline = get_family("sana"), load_pipeline(tiny_sana, torch.float32)
    with pytest.raises(ValueError, match=r"d\.heic cannot be read as a picture .* 1 of the \d pictures of"):
        build_cache(pipeline, family, load_pictures({"path": str(tmp_path)}, 32), (32, 32), CALL, tmp_path / "encoded")


def test_captions_may_lie_in_text_files_beside_the_pictures(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "beside"
    for split, name in (("", "a"), ("", "b"), ("deep", "c"), ("validation", "d"), ("test", "e")):
        (folder / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "blue").save(folder / split / f"{name}.png")
        (folder / split / f"{name}.txt").write_text(f"\ufeffpicture\n {name} \n", encoding="utf-8")
    Image.new("RGB", (32, 32)).save(folder / "f.jpg")
    monkeypatch.chdir(tmp_path)
    for dataset in ({"path": str(folder)}, {"path": "beside"}, {"path": "imagefolder", "data_dir": str(folder)}):
        data = load_pictures(dataset, 32)
        captions = {split: list(rows["caption"]) for split, rows in data.items()}
        assert captions == {
            "train": ["picture a", "picture b", "picture c", ""], "validation": ["picture d"], "test": ["picture e"],
        }  # fmt: skip
        assert picture_of(data["train"][2]["image"], "c").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("files", ["nosuch-*.tar", "cut.tar"])
def test_shards_that_cannot_be_read_are_named(files: str, tmp_path: Path) -> None:
    (tmp_path / "cut.tar").write_bytes(b"hello")
    dataset = {"path": "webdataset", "data_files": str(tmp_path / files), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(
        ValueError, match=rf"data set 'webdataset' \(data_files: .*{re.escape(files)}\) cannot be loaded"
    ):
        load_pictures(dataset, 64)


def test_webdataset_shards_are_read(tmp_path: Path, tiny_sana: Path) -> None:
    """Two tar files of pictures and texts by one name each; a damaged picture is named by it."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                content = io.BytesIO()
                Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(content, "JPEG")
                picture = content.getvalue()[: 100 if number == 13 else None]
                for ending, data in (("jpg", picture), ("txt", f"level {number}".encode())):
                    entry = tarfile.TarInfo(f"{number:03d}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    dataset = {"path": "webdataset", "data_files": str(tmp_path / "*.tar"), "cache_dir": str(tmp_path / "cache")}
    rows = load_pictures(dataset, 32)
    assert sorted(caption for split in rows.values() for caption in split["caption"]) == sorted(
        f"level {number}" for number in range(20)
    )
    family, pipeline = get_family("sana"), load_pipeline(tiny_sana, torch.float32)
    splits = build_cache(pipeline, family, rows, (32, 32), CALL, tmp_path / "encoded", skip=0.1)
    assert "level 13" not in splits["train"].captions
    said = (tmp_path / "encoded" / "train" / "left-out.txt").read_text()
    assert re.match(r"training data, train, row \d+ \(.*013\.jpg\) cannot be read as a picture", said)


def test_pictures_inside_a_table_are_named_by_their_row() -> None:
    content = io.BytesIO()
    Image.new("RGBA", (20, 24), (0, 0, 0, 0)).save(content, "PNG")
    assert picture_of({"bytes": content.getvalue(), "path": None}, "row 1").getpixel((0, 0)) == (255, 255, 255)
    assert picture_of(Image.new("LA", (4, 4), (0, 0)), "row 1").getpixel((0, 0)) == (255, 255, 255)
    for stored, says in (
        (None, "^row 2 has no picture"),
        ({"bytes": None, "path": None}, "^row 2 has no picture"),
        ({"bytes": b"GIF89a", "path": "a.gif"}, r"^row 2 \(a\.gif\) cannot be read as a picture"),
        ({"bytes": None, "path": "/none/a.png"}, r"^/none/a\.png is no file"),
    ):
        with pytest.raises(ValueError, match=says):
            picture_of(stored, "row 2")


def test_tiny_pictures_are_refused_and_others_cut_in_proportion() -> None:
    with pytest.raises(ValueError, match="row 5 has 40 x 15 pixels; a training picture has at least 16 on each side"):
        training_picture(Image.new("RGB", (40, 15)), (32, 32), "row 5")
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (16, 0, 80, 32))
    assert training_picture(wide, (64, 32), "row 1").getcolors() == [(64 * 32, (0, 0, 255))]


def test_a_column_that_holds_no_pictures_is_named() -> None:
    rows = datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["a"]})
    with pytest.raises(ValueError, match="data set 'mine': column 'image' holds string, not pictures"):
        undecoded(rows, "image", "mine")
