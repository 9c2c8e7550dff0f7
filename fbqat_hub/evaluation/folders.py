"""Folders of pictures: what evaluation draws, reads back and compares.

A folder holds PNG, JPEG or WebP files, and perhaps ``metadata.jsonl`` with a line ``{"file_name", "prompt", ...}`` for
each, which makes it an ``imagefolder`` of ``datasets``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
_FORMATS = ("PNG", "JPEG", "WEBP")  # whatever the ending: PIL knows others, some of which run programs
_LARGEST = 2**26  # pixels, 8192 x 8192: 200 MB of RGB
# Where `fbqat evaluate` leaves a run's pictures.
SAMPLES = Path("images") / "samples"


@dataclass(frozen=True)
class PictureFolder:
    """Pictures by name.

    Attributes:
        path: the folder.
        files: name without its ending -> file, in the order of the names.
        prompts: name -> prompt, for those that have one in ``metadata.jsonl``.
    """

    path: Path
    files: Mapping[str, Path]
    prompts: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> PictureFolder:
        """A folder of pictures, or the pictures that ``fbqat evaluate`` left in a run's folder.

        Raises:
            NotADirectoryError: ``path`` is no folder.
            ValueError: there are no pictures in it, two have the same name, or ``metadata.jsonl`` is not valid.
        """
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is not a folder; give a folder of pictures, or of an evaluated run.")
        root = path / SAMPLES if (path / SAMPLES).is_dir() else path
        files: dict[str, Path] = {}
        for file in sorted(root.iterdir()):
            if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
                continue
            if file.stem in files:
                raise ValueError(f"{root} holds both {files[file.stem].name} and {file.name}; keep one of them.")
            files[file.stem] = file
        if not files:
            run = (path / "recipe.yaml").exists() or (path / "model_index.json").exists()
            hint = f" Draw them: fbqat evaluate {quote(str(path))}" if run else ""
            raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)}).{hint}")
        return cls(path, files, _prompts(root / METADATA))


def matched(a: PictureFolder, b: PictureFolder) -> list[str]:
    """Names that both folders have, in order.

    Raises:
        ValueError: there are none.
    """
    common = [name for name in a.files if name in b.files]
    if not common:
        raise ValueError(
            f"{a.path} and {b.path} have no picture of the same name, such as {next(iter(a.files))!r} and "
            f"{next(iter(b.files))!r}; pictures are matched by their file names without the ending."
        )
    return common


def read_picture(file: Path) -> Tensor:
    """A picture as uint8 [3, H, W]; transparency is laid on white.

    Raises:
        ValueError: not a picture that can be read; the file is named.
    """
    with _opened(file) as picture:
        return as_tensor(picture)


def as_tensor(picture: Image.Image) -> Tensor:
    """A PIL picture as uint8 [3, H, W]; transparency is laid on white."""
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def as_image(picture: Tensor) -> Image.Image:
    """A uint8 [3, H, W] picture as PIL's."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def batches(files: Sequence[Path], batch_size: int = 32) -> Iterator[Tensor]:
    """Pictures in order as float32 [B, 3, H, W] in [0, 1]; a batch ends early where the size changes."""
    batch: list[Tensor] = []
    for file in files:
        picture = read_picture(file)
        if batch and (len(batch) == batch_size or picture.shape != batch[0].shape):
            yield torch.stack(batch).float() / 255
            batch = []
        batch.append(picture)
    if batch:
        yield torch.stack(batch).float() / 255


def pairs(files: Sequence[Path], references: Sequence[Path], batch_size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """As `batches`, of a picture and its reference, which have one size.

    Raises:
        ValueError: a pair of two sizes; both are named.
    """
    for file, reference in zip(files, references, strict=True):
        size, other = _size(file), _size(reference)
        if size != other:
            raise ValueError(
                f"{file} is {size[0]} x {size[1]} pixels and {reference} {other[0]} x {other[1]}; pictures are "
                "compared pixel by pixel, so draw both at one size."
            )
    yield from zip(batches(files, batch_size), batches(references, batch_size), strict=True)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > _LARGEST:
                raise ValueError(f"{width} x {height} pixels; at most {_LARGEST} are read")
            yield picture
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a picture ({error}).") from error


def _size(file: Path) -> tuple[int, int]:
    with _opened(file) as picture:
        return picture.size


def _prompts(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    prompts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if "prompt" in row:
                prompts[Path(row["file_name"]).stem] = str(row["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number} is not {{"file_name": ..., "prompt": ...}}.') from error
    return prompts
