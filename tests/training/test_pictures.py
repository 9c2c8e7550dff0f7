"""Pictures of a data set are learned as they are to be looked at, or refused by the name of their file."""

from __future__ import annotations

import io
import json
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
from fbqat_hub.training.cache import build_cache, load_pictures
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
