"""Into which tiles a picture is cut where its decoder is too large to be compiled for all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fbqat_hub.export.errors import ExportError
from fbqat_hub.families import Family, component_configs
from fbqat_hub.families.decoder import has_group_norms

#: Largest side in pixels that is decoded whole, and of the tiles otherwise: what Sana's decoder is compiled for within
#: 8 GB (7.78; the 16-channel one takes 2.45: docs/htp.md).
DEFAULT_TILE = 128
#: Of a decoder with group norms. Half of it is made of 8 rows.
SMALLEST_STAGE_TILE = 16
#: Shares of a tile that may overlap its neighbour.
_SHARES = (0.25, 0.5)


def decoder_tiles(
    pipeline: Any, family: Family, call: Mapping[str, Any], side: int | None = None
) -> dict[str, list[int]] | None:
    """In which tiles the picture that a call of the pipeline is asked for, or one of the model's own size, is decoded.

    None where it is decoded whole. Of a decoder with group norms, whose tiles join without an overlap, there is `size`
    alone, [height, width], the most that a tile makes (`stage_tile`); of others `tiles_of` the picture.

    Raises:
        ExportError: a side that there are no tiles of.
    """
    size = call if {"height", "width"} <= call.keys() else family.native_size(component_configs(pipeline))
    picture = (size["height"], size["width"])
    if not has_group_norms(pipeline.vae):
        return tiles_of(picture, pipeline.vae_scale_factor, side)
    if side is not None and side < SMALLEST_STAGE_TILE:
        raise ExportError(f"decoder_tile is {side}; give {SMALLEST_STAGE_TILE} or more")
    side = side or DEFAULT_TILE
    return None if max(picture) <= side else {"size": [side, side]}


def stage_tile(side: int, most: int) -> int:
    """Rows, or columns, of a decoder stage's tiles, so that few of about `most` cover the side, each 1 row wider.

    >>> [stage_tile(side, 128) for side in (64, 128, 256, 512)]  # 512 is 4 tiles of 132 that share 6 or 7 rows
    [64, 128, 132, 132]
    """
    count = -(-side // most)
    if count == 1:
        return side
    least = -(-(side - 2) // count) + 2
    return min(side, -(-least // 4) * 4)


def tiles_of(picture: Sequence[int], factor: int, side: int | None = None) -> dict[str, list[int]] | None:
    """`size` and `overlap` of the tiles, each [height, width] in pixels; None where the picture is one tile.

    The overlap is the smallest from a quarter to a half of the tile with which the last tile ends at the edge.

    Args:
        picture: (height, width) in pixels, multiples of `factor`.
        factor: pixels a side of one latent.
        side: of a tile in pixels; the largest of at most `DEFAULT_TILE` that there are tiles of if None.

    Raises:
        ExportError: no such overlap, or a side that is no multiple of `factor` of at least 4 latents.

    >>> tiles_of((512, 768), 8)
    {'size': [128, 128], 'overlap': [32, 48]}
    >>> tiles_of((64, 64), 8)
    """
    longest, smallest = max(picture), 4 * factor
    if longest <= (DEFAULT_TILE if side is None else side):
        return None
    possible = [each for each in range(smallest, longest, factor) if None not in _overlaps(picture, each, factor)]
    if side is None:
        side = max((each for each in possible if each <= DEFAULT_TILE), default=DEFAULT_TILE)
    if side < smallest or side % factor:
        raise ExportError(
            f"decoder_tile is {side}; a latent of this decoder is {factor} pixels, so give a multiple of {factor} from "
            f"{smallest} on"
        )
    overlaps = _overlaps(picture, side, factor)
    if None in overlaps:
        nearest = sorted(sorted(possible, key=lambda each: abs(each - side))[:5])
        raise ExportError(
            f"a picture of {picture[1]} x {picture[0]} pixels has no tiles of {side} that overlap by a quarter to a "
            f"half and end at its edges; decoder_tile can be {', '.join(map(str, nearest))}, or {longest} to "
            "decode it whole"
        )
    return {"size": [min(side, whole) for whole in picture], "overlap": [each or 0 for each in overlaps]}


def _overlaps(picture: Sequence[int], side: int, factor: int) -> list[int | None]:
    return [_overlap(whole, side, factor) for whole in picture]


def _overlap(whole: int, side: int, factor: int) -> int | None:
    """In pixels; 0 of a side that is one tile, None where there is none."""
    if whole <= side:
        return 0
    latents, tile = whole // factor, side // factor
    least, most = (int(tile * share) for share in _SHARES)
    fits = (each for each in range(max(least, 1), most + 1) if (latents - tile) % (tile - each) == 0)
    found = next(fits, None)
    return None if found is None else found * factor
