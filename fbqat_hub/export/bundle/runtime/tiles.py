"""A picture decoded in tiles that overlap, blended as diffusers' `tiled_decode` does: numpy; travels with a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def decode_tiled(
    decode: Callable[[np.ndarray], np.ndarray],
    latents: np.ndarray,
    tiles: Mapping[str, Sequence[int]] | None,
    picture: Sequence[int],
) -> np.ndarray:
    """The picture [3, H, W] of latents [1, C, H / f, W / f].

    Tiles start where those of diffusers' `tiled_decode` do, and are blended in its order. Its tile behind the last
    whole one, which is as small as the overlap, is left out: a graph has one size, and the picture is complete.

    Args:
        decode: latents of a tile [1, C, h, w], contiguous -> its pixels, 3 h f w f in the order [3, h f, w f].
        tiles: `size` and `overlap` in pixels, each (height, width); the tiles end at the picture's edges. None where
            the picture is decoded whole.
        picture: (H, W).
    """
    tiles = tiles or {"size": picture, "overlap": (0, 0)}
    tops, lefts = (
        range(0, whole - size + 1, size - overlap)
        for whole, size, overlap in zip(picture, tiles["size"], tiles["overlap"], strict=True)
    )
    factor = picture[0] // latents.shape[2]
    height, width = (size // factor for size in tiles["size"])
    bands: list[np.ndarray] = []
    above: list[np.ndarray] = []
    for top in tops:
        row: list[np.ndarray] = []
        for place, left in enumerate(lefts):
            y, x = top // factor, left // factor
            part = np.ascontiguousarray(latents[:, :, y : y + height, x : x + width])
            pixels = decode(part).reshape(3, *tiles["size"])
            if above:
                pixels = blend(above[place], pixels, tiles["overlap"][0], axis=1)
            if row:
                pixels = blend(row[-1], pixels, tiles["overlap"][1], axis=2)
            row.append(pixels)
        bands.append(np.concatenate([*(each[:, :, : lefts.step] for each in row[:-1]), row[-1]], axis=2))
        above = row
    return np.concatenate([*(band[:, : tops.step] for band in bands[:-1]), bands[-1]], axis=1)


def as_pixels(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of values [3, H, W] in [-1, 1]."""
    pixels: np.ndarray = np.clip(127.5 * picture.transpose(1, 2, 0) + 127.5, 0, 255).round().astype(np.uint8)
    return pixels


def blend(before: np.ndarray, pixels: np.ndarray, overlap: int, axis: int) -> np.ndarray:
    """`pixels` whose first `overlap` rows (axis 1) or columns (axis 2) go over linearly from the last of `before`."""
    shape = [1, 1, 1]
    shape[axis] = overlap
    share = (np.arange(overlap) / overlap).reshape(shape)
    first, rest = np.split(pixels, [overlap], axis=axis)
    last = np.split(before, [before.shape[axis] - overlap], axis=axis)[1]
    blended: Any = last * (1 - share).astype(np.float32) + first * share.astype(np.float32)
    return np.concatenate([blended, rest], axis=axis)
