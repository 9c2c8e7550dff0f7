"""What a user types or puts into a text file, checked once each. Every error is one line that names it.

Arguments of a pipeline call are checked by `fbqat_hub.training.call`, recipes by `fbqat_hub.training.recipe`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_SEED = 2**32 - 1  # torch's CPU generator drops higher bits: two seeds would be the same
_LARGEST_TEXT = 2**24
DEVICES = ("cpu", "cuda", "mps", "xpu")


def local_path(text: str) -> Path:
    """A path on this machine, which need not be there.

    >>> local_path("runs/tiny").name
    'tiny'

    Raises:
        ValueError: it is empty, or a path of Windows on another system.
    """
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r} is no path; give a file or folder, e.g. runs/tiny.")
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        raise ValueError(f"{text} is a path of Windows; on this machine paths are written like /home/me/{_tail(text)}.")
    return Path(text)


def model_source(text: str) -> str:
    """A folder, or a Hub id; which of them, and whether it is there, is seen when it is opened.

    Raises:
        ValueError: as `local_path`.
    """
    local_path(text)
    return text


def whole_number(text: str, least: int, most: int) -> int:
    """A whole number in a range.

    >>> whole_number("3", 1, 5)
    3

    Raises:
        ValueError: it is no number, or out of the range.
    """
    if not re.fullmatch(r"\s*[-+]?[0-9]{1,40}\s*", text) or not least <= int(text) <= most:
        raise ValueError(f"{text!r:.50} is not a whole number from {least} to {most}.")
    return int(text)


def seeds(first: int, count: int) -> list[int]:
    """``count`` seeds from ``first`` on, one for each picture.

    Raises:
        ValueError: one of them is not from 0 to 2^32 - 1.
    """
    if not 0 <= first <= MAX_SEED - count + 1:
        raise ValueError(
            f"the seed is {first}; for {count} pictures it is a whole number from 0 to {MAX_SEED - count + 1}."
        )
    return list(range(first, first + count))


def read_text(path: Path, *, strict: bool = True) -> str:
    """A text file in UTF-8, of at most 16 MiB.

    Args:
        strict: what is not text is an error; else replaced, as in a log.

    Raises:
        OSError: it is not there, is a folder, or cannot be read.
        ValueError: it is not text, or too large.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a text file.")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    with path.open("rb") as file:
        data = file.read(_LARGEST_TEXT + 1)
    if len(data) > _LARGEST_TEXT:
        raise ValueError(f"{path} has more than {_LARGEST_TEXT >> 20} MiB; give a text file of fewer lines.")
    try:
        text = data.decode("utf-8-sig", "strict" if strict else "replace")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}); save it as UTF-8.") from None
    if strict and "\0" in text:
        raise ValueError(f"{path} is not text: it holds zero bytes.")
    return text


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        OSError, ValueError: as `read_text`, or there are no prompts in it.
    """
    # not splitlines, which would cut a prompt that was copied from a web page in two, at a U+2028
    prompts = [line.strip() for line in re.split(r"[\r\n]", read_text(path)) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty; write one prompt on each line.")
    return prompts


def checked_device(name: str | None) -> str:
    """A device that networks can run on here; a CUDA GPU if there is one, else the CPU, where none is named.

    Raises:
        ValueError: it is unknown, or this machine or this torch has none of it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(rf"({'|'.join(DEVICES)})(?::([0-9]{{1,4}}))?", name)
    if not found:
        raise ValueError(f"device is {name!r:.50}; allowed: {', '.join(DEVICES)}, or one of several, e.g. cuda:1.")
    kind, index = found[1], int(found[2] or 0)
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    count = counts.get(kind, int(torch.backends.mps.is_available()))
    if index >= count:
        there = f"{count} of them" if count else "none"
        built = (
            "" if kind != "cuda" or torch.version.cuda else f", and this torch ({torch.__version__}) is built without"
        )
        raise ValueError(f"device is {name}, but this machine has {there}{built}; use --device cpu, or leave it out.")
    return name


def output_folder(path: Path) -> Path:
    """A folder that can be written to, or made; nothing is made here.

    Raises:
        OSError: it is a file, or cannot be made or written to.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; give a folder as --output.")
    _writable(path)
    return path


def check_new(output: Path, *, ignored: str = "") -> None:
    """Raise FileExistsError if a folder has content, beside a file or folder of the name ``ignored``."""
    if output.exists() and any(path.name != ignored for path in output.iterdir()):
        raise FileExistsError(f"{output} exists and is not empty; give another --output.")


def output_picture(path: Path) -> Path:
    """A PNG file that can be written; nothing is written here.

    Raises:
        ValueError: it does not end in .png, or is a folder.
        OSError: its folder cannot be made or written to.
    """
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"output is {path}; it must be a file that ends in .png.")
    _writable(path.parent)
    return path


def _writable(folder: Path) -> None:
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made, since {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written into {there}; give another --output, or change its permissions.")


def _tail(text: str) -> str:
    return re.split(r"[\\/]", text)[-1] or "folder"
