"""Picture files as pixels: one reader for training, evaluation and comparison, so that all see the same picture.

| what the file has | what is read |
|---|---|
| transparency, also of a palette or a single colour | the picture on white |
| 16-bit grey | the same levels in 8 bits: v / 257, rounded |
| an EXIF orientation | the picture as it is to be looked at |
| CMYK, greyscale, a palette, 16 bits per colour | RGB, 8 bits per colour |
| several frames | the first |
| an embedded colour profile | its numbers as they are; the profile is not applied |
| 32-bit integers or floating point | refused: what is white is not defined |
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Whatever the name's ending: PIL knows others, some of which run programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_LARGEST = 2**26  # pixels, 8192 x 8192: 200 MB of RGB


def read_rgb(source: Path | bytes, name: str | None = None) -> Image.Image:
    """A picture file as 8-bit RGB, see the table above.

    Args:
        source: a file, or its content.
        name: what to call it in an error; the file's own name if None.

    Raises:
        ValueError: not a picture that can be read; it is named.
    """
    with _opened(source, name) as picture:
        return rgb(picture)


def read_picture(file: Path) -> Tensor:
    """As `read_rgb`: uint8 [3, H, W]."""
    return as_tensor(read_rgb(file))


def size_of(file: Path) -> tuple[int, int]:
    """(width, height) of what `read_rgb` reads, without reading the pixels.

    Raises:
        ValueError: as `read_rgb`.
    """
    with _opened(file, None) as picture:
        width, height = picture.size
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's orientation: by a quarter
        return (height, width) if turned else (width, height)


def rgb(picture: Image.Image) -> Image.Image:
    """A PIL picture of any mode as 8-bit RGB, see the table above.

    Raises:
        ValueError: its levels have no defined white.
    """
    picture.seek(0)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return _of_16_bits(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"32-bit levels (mode {picture.mode}) have no defined white; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return picture.convert("RGB")


def as_tensor(picture: Image.Image) -> Tensor:
    """As `rgb`: uint8 [3, H, W]."""
    return torch.from_numpy(np.array(rgb(picture))).permute(2, 0, 1).contiguous()


def as_image(picture: Tensor) -> Image.Image:
    """A uint8 [3, H, W] picture as PIL's."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def is_one_colour(picture: Tensor) -> bool:
    """True of a picture, [3, H, W], whose pixels are all the same."""
    return bool((picture == picture[:, :1, :1]).all())


def pixels(pictures: Sequence[Any]) -> Tensor:
    """RGB pictures of one size, PIL's or arrays, as uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


@contextmanager
def _opened(source: Path | bytes, name: str | None) -> Iterator[Image.Image]:
    named = name or ("a picture" if isinstance(source, bytes) else str(source))
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"{named} is no file.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > _LARGEST:
                raise ValueError(f"{width} x {height} pixels; at most {_LARGEST} are read")
            yield picture
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make PIL's decoders stumble in many ways
        said = f"not {', '.join(_FORMATS)}" if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".")
        raise ValueError(f"{named} cannot be read as a picture ({said}).") from error


def _of_16_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, of which a PNG can say that one level is transparent."""
    levels = np.asarray(picture).astype(np.uint32)
    grey = ((levels + 128) // 257).astype(np.uint8)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey[levels == clear] = 255
    return Image.fromarray(grey).convert("RGB")
