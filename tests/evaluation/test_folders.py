"""Folders of pictures: what is read, how names match, and that every wrong folder is named."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fbqat_hub.evaluation.folders import PictureFolder, batches, matched, pairs


def put(folder: Path, *names: str, size: tuple[int, int] = (16, 16), colour: str = "red") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, colour).save(folder / name)
    return folder


def test_pictures_of_all_kinds_match_by_name_without_the_ending(tmp_path: Path) -> None:
    a = put(tmp_path / "a", "2.png", "1.jpg", "3.webp")
    b = put(tmp_path / "b", "1.PNG", "2.jpeg", "4.png")
    (a / "notes.txt").write_text("not a picture")
    first, second = PictureFolder.open(a), PictureFolder.open(b)
    assert list(first.files) == ["1", "2", "3"]
    assert matched(first, second) == ["1", "2"]


def test_the_pictures_of_a_run_and_their_prompts_are_found(tmp_path: Path) -> None:
    samples = put(tmp_path / "images" / "samples", "00000.png", "00001.png")
    put(tmp_path / "images", "comparison.png")
    (samples / "metadata.jsonl").write_text(json.dumps({"file_name": "00001.png", "prompt": "red heart"}) + "\n")
    folder = PictureFolder.open(tmp_path)
    assert list(folder.files) == ["00000", "00001"]
    assert folder.prompts == {"00001": "red heart"}


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: x")
    twice = put(tmp_path / "twice", "1.png", "1.jpg")
    broken = put(tmp_path / "broken", "1.png")
    (broken / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png"}) + "\nx\n")
    for path, says in (
        (tmp_path / "none", "none is not a folder"),
        (tmp_path / "empty", r"empty holds no pictures \(.png, .jpg, .jpeg, .webp\)\.$"),
        (tmp_path / "run", "holds no pictures .* Generate them: fbqat evaluate .*run"),
        (twice, "1.jpg and 1.png; keep one"),
        (broken, "metadata.jsonl, line 2"),
    ):
        with pytest.raises((ValueError, NotADirectoryError), match=says):
            PictureFolder.open(path)
    a, b = put(tmp_path / "a", "1.png"), put(tmp_path / "b", "2.png")
    with pytest.raises(ValueError, match="no picture of the same name, such as '1' and '2'"):
        matched(PictureFolder.open(a), PictureFolder.open(b))


def test_pictures_are_read_as_training_reads_them(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 2), 51).save(tmp_path / "grey.png")
    (batch,) = batches([tmp_path / "clear.png", tmp_path / "grey.png"])
    assert batch.shape == (2, 3, 2, 4)
    torch.testing.assert_close(batch[0], torch.ones(3, 2, 4))
    torch.testing.assert_close(batch[1], torch.full((3, 2, 4), 0.2))


@pytest.mark.parametrize(
    "line",
    [b"x", b"3", b'["prompt"]', b'{"prompt": "red"}', b'{"file_name": "1.png", "prompt": null}',
     b'{"file_name": 3, "prompt": "red"}', b'{"file_name": "1.png", "prompt": ["red"]}'],
)  # fmt: skip
def test_a_wrong_row_of_prompts_is_named(line: bytes, tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "1.png", "prompt": "a\xe2\x80\xa8b"}\n\n' + line)
    with pytest.raises(ValueError, match=r'metadata\.jsonl, line 3 is .*; it must be {"file_name": "1.png", "prompt"'):
        PictureFolder.open(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff" + line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not text in UTF-8"):
        PictureFolder.open(tmp_path)


def test_a_batch_ends_where_the_size_changes_and_a_pair_of_two_sizes_is_refused(tmp_path: Path) -> None:
    small, large = put(tmp_path, "1.png", "2.png", "3.png"), put(tmp_path / "large", "1.png", size=(20, 16))
    files = [small / "1.png", small / "2.png", large / "1.png", small / "3.png"]
    assert [tuple(batch.shape) for batch in batches(files, 2)] == [(2, 3, 16, 16), (1, 3, 16, 20), (1, 3, 16, 16)]
    with pytest.raises(ValueError, match=r"large/1.png is 20 x 16 pixels and .*1.png 16 x 16"):
        list(pairs([large / "1.png"], [small / "1.png"]))
