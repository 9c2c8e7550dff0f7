"""The comparison of ways to ship a fine-tune: the style, what is made once, and what the tracked rows have."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from PIL import Image

from benchmarks.fine_tune import RESULTS, _once, in_style, write_pictures
from benchmarks.tables.lora import _WAYS
from fbqat_hub.training.recipe import load_recipe


def test_the_style_is_blue_ink() -> None:
    picture = Image.new("RGB", (2, 1), "white")
    picture.putpixel((1, 0), (0, 0, 0))
    styled = in_style(picture)
    assert [styled.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (29, 53, 87)]


def test_what_is_held_out_is_in_no_other_split(tmp_path: Path) -> None:
    recipe = load_recipe("sana-tiny")
    pictures, held_out = write_pictures(recipe, tmp_path)
    of = {
        split: {path.read_text() for path in (tmp_path / split).glob("*.txt")}
        for split in ("train", "validation", "test")
    }
    assert sorted(held_out) == sorted(of["validation"] | of["test"])
    assert not of["train"] & set(held_out)
    assert len(pictures) == sum(map(len, of.values())) > 10 * len(of["test"])


def test_what_was_made_is_not_made_again(tmp_path: Path) -> None:
    folder, made = tmp_path / "adapter", []

    def make() -> None:
        assert not folder.exists(), "what an interruption left is in the way"
        folder.mkdir()
        made.append(1)

    folder.mkdir()  # of a run that was interrupted
    seconds = _once(folder, make)
    assert _once(folder, make) == seconds
    assert made == [1]


def test_each_row_is_there_once_and_an_adapter_teaches_the_style() -> None:
    rows = [row for row in json.loads(RESULTS.read_text()) if row["kind"] == "way"]
    ways = Counter((row["family"], row["seed"], row["way"]) for row in rows)
    assert set(ways.values()) == {1}
    assert {way for *_, way in ways} <= set(_WAYS)
    for row in rows:
        base = next(
            each["loss"]
            for each in rows
            if (each["family"], each["seed"], each["way"]) == (row["family"], row["seed"], "float")
        )
        assert row["loss"] < 0.7 * base or row["way"] in ("float", "packed"), row["way"]


def test_a_packed_base_takes_less_memory_than_a_float_one() -> None:
    rows = [row for row in json.loads(RESULTS.read_text()) if row["kind"] == "memory"]
    peaks = {row["base"]: row["peak_rss_mib"] for row in rows}
    assert len(rows) == 2
    assert peaks["packed"] < peaks["float"]
