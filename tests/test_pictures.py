"""One reader of pictures: what a file holds is what is seen, or it is refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fbqat_hub.pictures import as_tensor, is_one_colour, read_picture, read_rgb, size_of

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_16_bits(colour_type: int, levels: tuple[int, ...], *chunks: bytes) -> bytes:
    """4 x 4 pixels of one colour, 16 bits a level; PIL writes no such files."""
    row = b"\0" + struct.pack(f">{len(levels)}H", *levels) * 4
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")


def palette(transparent: int) -> dict[str, Any]:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 255, 255, 0, 0])
    return {"picture": picture, "transparency": transparent}


@pytest.mark.parametrize(
    ("name", "options", "seen"),
    [
        ("rgba.png", {"picture": Image.new("RGBA", (4, 4), (255, 0, 0, 0))}, WHITE),
        ("half.png", {"picture": Image.new("RGBA", (4, 4), (255, 0, 0, 128))}, (255, 127, 127)),
        ("la.png", {"picture": Image.new("LA", (4, 4), (0, 0))}, WHITE),
        ("palette.png", palette(0), RED),
        ("clear.png", palette(1), WHITE),
        ("clear.gif", palette(1), WHITE),
        ("colour.png", {"picture": Image.new("RGB", (4, 4), BLUE), "transparency": BLUE}, WHITE),
        ("grey.png", {"picture": Image.new("L", (4, 4), 51)}, (51, 51, 51)),
        ("bits.png", {"picture": Image.new("1", (4, 4), 1)}, WHITE),
        ("cmyk.jpg", {"picture": Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "quality": 100}, RED),
        ("grey16.png", {"picture": Image.fromarray(np.full((4, 4), 0x8080, np.uint16))}, (128, 128, 128)),
        ("grey16.tiff", {"picture": Image.fromarray(np.full((4, 4), 65535, np.uint16))}, WHITE),
        ("frames.gif", {"picture": Image.new("RGB", (4, 4), RED), "save_all": True,
                        "append_images": [Image.new("RGB", (4, 4), BLUE)]}, RED),
        ("frames.webp", {"picture": Image.new("RGB", (4, 4), RED), "save_all": True, "lossless": True,
                         "append_images": [Image.new("RGB", (4, 4), BLUE)]}, RED),
    ],
)  # fmt: skip
def test_what_is_in_a_file_is_what_is_seen(name: str, options: dict[str, Any], seen: tuple, tmp_path: Path) -> None:
    picture = options.pop("picture")
    picture.save(tmp_path / name, **options)
    found = read_rgb(tmp_path / name)
    assert (found.mode, found.size, found.getcolors()) == ("RGB", (4, 4), [(16, seen)])
    assert read_rgb((tmp_path / name).read_bytes()).tobytes() == found.tobytes()
    torch.testing.assert_close(as_tensor(Image.open(tmp_path / name)), read_picture(tmp_path / name), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (png_of_16_bits(0, (0x1234,)), (18, 18, 18)),
        (png_of_16_bits(0, (0x1234,), chunk(b"tRNS", struct.pack(">H", 0x1234))), WHITE),
        (png_of_16_bits(0, (0x1234,), chunk(b"tRNS", struct.pack(">H", 0x1235))), (18, 18, 18)),
        (png_of_16_bits(2, (65535, 0x8080, 0)), (255, 128, 0)),
        (png_of_16_bits(4, (0, 0)), WHITE),
        (png_of_16_bits(6, (65535, 0, 0, 0)), WHITE),
    ],
)
def test_levels_of_16_bits(content: bytes, seen: tuple) -> None:
    assert read_rgb(content).getcolors() == [(16, seen)]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_picture_that_lies_on_its_side_is_set_up(ending: str, tmp_path: Path) -> None:
    """Blue above red, taken with the camera turned: EXIF says to turn it by 90 degrees clockwise."""
    picture = Image.new("RGB", (20, 32), RED)
    picture.paste(BLUE, (0, 0, 20, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / f"a.{ending}", exif=exif, quality=100)
    found = read_rgb(tmp_path / f"a.{ending}")
    assert found.size == size_of(tmp_path / f"a.{ending}") == (32, 20)
    for place, colour in (((4, 10), RED), ((28, 10), BLUE)):
        assert np.abs(np.subtract(found.getpixel(place), colour)).max() < 3


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    data = whole.getvalue()
    for length in (0, 5, 20, 40, 300, len(data) - 30):
        (tmp_path / "cut.png").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.png cannot be read as a picture \("):
            read_rgb(tmp_path / "cut.png")
    for mode in ("I", "F"):
        Image.new(mode, (4, 4)).save(tmp_path / "deep.tiff")
        with pytest.raises(ValueError, match=r"deep\.tiff .*32-bit levels .*save it with 8 or 16 bits"):
            read_rgb(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=r"row 3 cannot be read as a picture \(not PNG"):
        read_rgb(b"text", "row 3")
    with pytest.raises(ValueError, match=r"none\.png is no file"):
        read_rgb(tmp_path / "none.png")


def test_one_colour() -> None:
    grey = torch.full((3, 4, 4), 7, dtype=torch.uint8)
    assert is_one_colour(grey)
    grey[2, 3, 3] = 8
    assert not is_one_colour(grey)
