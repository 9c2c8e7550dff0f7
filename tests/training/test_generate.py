"""Pictures from a packed pipeline: the right size, the same for a seed, nothing written when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fbqat_hub.training.generate import generate


def test_picture_has_the_recipes_size_and_depends_on_the_seed_only(run_folder: Path, tmp_path: Path) -> None:
    paths = [
        generate(str(run_folder), ["dark red"], tmp_path / name / "out.png", seed=seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    a, b, c = (Image.open(path) for path in paths)
    assert (a.format, a.size) == ("PNG", (32, 32))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_several_prompts_make_a_grid_each_from_the_next_seed(run_folder: Path, tmp_path: Path) -> None:
    both = generate(str(run_folder), ["red", "red"], tmp_path / "both.png", seed=3)
    second = generate(str(run_folder), ["red"], tmp_path / "second.png", seed=4)
    grid, tile = np.asarray(Image.open(both)), np.asarray(Image.open(second))
    assert grid.shape[1] >= 64
    windows = np.lib.stride_tricks.sliding_window_view(grid, tile.shape).reshape(-1, *tile.shape)
    # a batch of two and a batch of one differ by float rounding: at most one level of 255
    assert abs(windows.astype(int) - tile).max(axis=(1, 2, 3)).min() <= 1


def test_arguments_of_the_call_can_be_changed(run_folder: Path, tmp_path: Path) -> None:
    path = generate(str(run_folder), ["red"], tmp_path / "out.png", call={"height": 64})
    assert Image.open(path).size == (32, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["red", "  "]}, "no prompt, or an empty one"),
        ({"call": {"hight": 64}}, r"the call of SanaPipeline: 'hight' \(did you mean 'height'\?\)"),
        ({"call": {"height": 33}}, "divisible by 32"),
        ({"name": "out.jpg"}, "out.jpg; it must be a file that ends in .png"),
        ({"name": "folder.png"}, "it must be a file that ends in .png"),
    ],
)
def test_refused_and_nothing_written(arguments: dict[str, Any], message: str, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    given = {"prompts": ["red"], "name": "out.png", **arguments}
    with pytest.raises(ValueError, match=message):
        generate(str(run_folder), given.pop("prompts"), tmp_path / given.pop("name"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_full_disk_leaves_the_older_picture(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.png").write_bytes(b"older")

    def full(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        generate(str(run_folder), ["red"], tmp_path / "out.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]
