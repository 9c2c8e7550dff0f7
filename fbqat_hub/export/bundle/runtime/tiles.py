"""A picture decoded in tiles: numpy; travels with a bundle.

`decode_tiled` blends tiles that overlap, as diffusers' `tiled_decode` does. `decode_stages` is for a decoder with group
norms, whose mean and variance are of the whole picture: it is cut at them, and the tiles join without a seam.
"""

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


def decode_stages(
    open_graph: Callable[[str], Callable[[dict[str, np.ndarray]], np.ndarray]],
    latents: np.ndarray,
    stages: Sequence[Mapping[str, Any]],
    norms: Mapping[str, np.ndarray],
) -> np.ndarray:
    """The picture [3, H, W] of latents [1, C, h, w], by the graphs of a decoder that is cut at its group norms.

    Args:
        open_graph: the name of a graph -> what runs it, inputs by name -> output.
        stages: in order, as the manifest has them: see `stage_map`.
        norms: weight and bias [C] of each stage's group norm, `<graph>.weight` and `<graph>.bias`.
    """
    maps = {"latents": latents}
    for stage in stages:
        maps[stage["makes"]] = stage_map(open_graph(stage["graph"]), stage, maps, norms)
    return maps["picture"][0]


def stage_map(
    run: Callable[[dict[str, np.ndarray]], np.ndarray],
    stage: Mapping[str, Any],
    maps: Mapping[str, np.ndarray],
    norms: Mapping[str, np.ndarray],
) -> np.ndarray:
    """What one stage makes of the whole picture, [1, C', factor * H, factor * W], float32.

    Args:
        stage: `source` and `skip` (may be null) name maps [1, C, H, W], which the graph reads in tiles of `tile`
            (height, width); `norm` (`groups`, `epsilon`; null for none) is the group norm of the source, and `factor`
            how many rows are made of one.
    """
    source, skip, factor = maps[stage["source"]], stage["skip"] and maps[stage["skip"]], stage["factor"]
    (height, width), (rows, columns) = source.shape[2:], stage["tile"]
    scale, shift = norm_of(source, stage, norms) if stage["norm"] else (None, None)
    made: Any = None
    for top in starts(height, rows):
        for left in starts(width, columns):
            place = np.s_[:, :, top : top + rows, left : left + columns]
            feed = {"source": np.ascontiguousarray(source[place] if scale is None else source[place] * scale + shift)}
            if skip is not None:
                feed["skip"] = np.ascontiguousarray(skip[place])
            part = run(feed).reshape(1, -1, factor * rows, factor * columns)
            if made is None:
                made = np.empty((1, part.shape[1], factor * height, factor * width), np.float32)
            # inside the picture a tile's first and last row lacks a neighbour; the last is written again by the next
            y, x = min(top, 1), min(left, 1)
            made[:, :, factor * (top + y) : factor * (top + rows), factor * (left + x) : factor * (left + columns)] = (
                part[:, :, factor * y :, factor * x :]
            )
    return np.asarray(made)


def starts(side: int, tile: int) -> list[int]:
    """Where tiles start that cover a side and share 2 rows or more with their neighbours.

    >>> starts(512, 132)
    [0, 126, 253, 380]
    """
    last = -(-(side - tile) // (tile - 2))
    return [place * (side - tile) // max(last, 1) for place in range(last + 1)]


def norm_of(
    source: np.ndarray, stage: Mapping[str, Any], norms: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The group norm of a map [1, C, H, W] as a product and a sum, [C, 1, 1] each, float32.

    Sums are in float64, so that their order does not show in the result.
    """
    weight, bias = (norms[f"{stage['graph']}.{name}"].astype(np.float64) for name in ("weight", "bias"))
    groups = source.reshape(stage["norm"]["groups"], -1)
    mean = groups.mean(1, dtype=np.float64)
    variance = np.array(
        [np.square(np.subtract(group, each, dtype=np.float64)).mean() for group, each in zip(groups, mean, strict=True)]
    )
    share = len(weight) // len(groups)
    scale = weight * np.repeat(1 / np.sqrt(variance + stage["norm"]["epsilon"]), share)
    shift = bias - np.repeat(mean, share) * scale
    return scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None]


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
