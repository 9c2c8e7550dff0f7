"""What a user types, checked once: every error is one line that names what was given and what is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fbqat_hub.inputs import (
    MAX_SEED,
    checked_device,
    local_path,
    output_folder,
    output_picture,
    read_prompts,
    read_text,
    seeds,
    whole_number,
)


def test_prompts_are_the_lines_that_are_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfred heart\r\n\n  caf\xc3\xa9 \rblue\xe2\x80\xa8sky\n")
    assert read_prompts(file) == ["red heart", "café", "blue\u2028sky"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file .*prompts.txt"),
        (b"", "prompts.txt is empty; write one prompt on each line"),
        (b" \n\t\n", "prompts.txt is empty"),
        (b"\x89PNG\r\n", "prompts.txt is not text in UTF-8 .byte 0.; save it as UTF-8"),
        ("red".encode("utf-16"), "prompts.txt is not text in UTF-8"),
        (b"red\0heart", "prompts.txt is not text: it holds zero bytes"),
        (b"a" * (2**24 + 1), "prompts.txt has more than 16 MiB"),
    ],
)
def test_a_prompts_file_that_is_none_is_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=says):
        read_prompts(file)


def test_a_folder_is_no_text_file_and_a_log_may_hold_anything(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; give a text file"):
        read_text(tmp_path)
    (tmp_path / "log").write_bytes(b"error \xff\0 14001")
    assert read_text(tmp_path / "log", strict=False).endswith("14001")


@pytest.mark.skipif(os.name == "nt", reason="there these are paths")
@pytest.mark.parametrize("text", ["C:\\models\\sana", "d:/models", "\\\\server\\share"])
def test_a_path_of_windows_is_said_to_be_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"is a path of Windows; on this machine paths are written like /home/me/\w+"):
        local_path(text)


@pytest.mark.parametrize("text", ["", "  ", "a\0b"])
def test_an_empty_path_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no path"):
        local_path(text)


@pytest.mark.parametrize("text", ["", "abc", "1.5", "1e3", "-1", "6", str(2**70), "9" * 5000, "0x1", "¹"])
def test_what_is_no_whole_number_of_the_range(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number from 1 to 5"):
        whole_number(text, 1, 5)


def test_seeds_of_several_pictures_stay_in_the_range() -> None:
    assert seeds(MAX_SEED - 1, 2) == [MAX_SEED - 1, MAX_SEED]
    for first, count in ((-1, 1), (MAX_SEED + 1, 1), (MAX_SEED, 2), (2**70, 1)):
        with pytest.raises(ValueError, match=r"the seed is .* from 0 to"):
            seeds(first, count)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "device is 'gpu'; allowed: cpu, cuda, mps, xpu, or one of several, e.g. cuda:1"),
        ("", "device is ''; allowed"),
        ("cuda:-1", "allowed"),
        ("meta", "allowed"),
        ("cpu:1", "device is cpu:1, but this machine has 1 of them"),
        ("cuda", "device is cuda, but this machine has none"),
        ("mps", "device is mps, but this machine has none"),
        ("cuda:1", "this machine has none"),
    ],
)
def test_a_device_that_is_not_there_is_named(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=says):
        checked_device(name)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checked_device(None) == "cuda"
    assert checked_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="device is cuda:2, but this machine has 2 of them"):
        checked_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked_device(None) == "cpu"


def test_an_output_is_known_to_be_writable_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.png").write_bytes(b"x")
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert output_picture(tmp_path / "a" / "b.PNG")
    with pytest.raises(NotADirectoryError, match=r"file\.png is a file; give a folder as --output"):
        output_folder(tmp_path / "file.png")
    for output in (tmp_path / "file.png" / "deep" / "er", tmp_path / "file.png" / "a"):
        with pytest.raises(NotADirectoryError, match=r"cannot be made, since .*file\.png is a file"):
            output_folder(output)
    for name in ("a.jpg", "a", "."):
        with pytest.raises(ValueError, match=r"it must be a file that ends in \.png"):
            output_picture(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="nothing can be written into"):
        output_folder(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.png"]
