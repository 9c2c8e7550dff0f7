"""Pictures of a data set: kept as files, read by the same reader as everything else (`fbqat_hub.pictures`).

`datasets` would decode them itself: transparency dropped, 16-bit grey cut to white, and a damaged one without its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageOps

from fbqat_hub.pictures import read_rgb, rgb

_SMALLEST = 16  # pixels on a side


def undecoded(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """The rows with the pictures of ``column`` as they are stored; read one with `picture_of`.

    Args:
        name: of the data set, for errors.

    Raises:
        ValueError: the column does not hold pictures.
    """
    feature = rows.features[column]
    if not isinstance(feature, datasets.Image):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(f"data set {name!r}: column {column!r} holds {kind}, not pictures (datasets.Image).")
    return rows.cast_column(column, datasets.Image(decode=False))


def picture_of(stored: Mapping[str, Any] | Image.Image, where: str) -> Image.Image:
    """A picture of a row as 8-bit RGB.

    Args:
        stored: ``{"path", "bytes"}``, or a picture that is decoded already.
        where: the data set and row, for errors where the picture has no file of its own.

    Raises:
        ValueError: it is missing or cannot be read; its file, or ``where``, is named.
    """
    if isinstance(stored, Image.Image):
        return rgb(stored)
    if stored is None or (stored["bytes"] is None and not stored["path"]):
        raise ValueError(f"{where} has no picture.")
    if stored["bytes"] is not None:
        return read_rgb(stored["bytes"], name_of(stored, where))
    path = Path(stored["path"])
    if path.is_absolute():
        return read_rgb(path)
    from datasets.utils.file_utils import xopen  # inside an archive, say

    with xopen(stored["path"], "rb") as file:
        return read_rgb(file.read(), stored["path"])


def training_picture(stored: Mapping[str, Any] | Image.Image, size: tuple[int, int], where: str) -> Image.Image:
    """The middle of a picture in the proportions of ``size`` (width, height), resized to it.

    Raises:
        ValueError: as `picture_of`, or a side of fewer than 16 pixels.
    """
    picture = picture_of(stored, where)
    if min(picture.size) < _SMALLEST:
        raise ValueError(
            f"{name_of(stored, where)} has {picture.width} x {picture.height} pixels; a training picture has at least "
            f"{_SMALLEST} on each side."
        )
    return ImageOps.fit(picture, size)


def name_of(stored: Mapping[str, Any] | Image.Image, where: str) -> str:
    """What to call a picture of a row in an error: its file, or ``where``."""
    path = None if isinstance(stored, Image.Image) else stored["path"]
    return f"{where} ({path})" if path and not Path(path).is_absolute() else path or where
