"""Tiles of a decoder: diffusers' own, or those of a stage between norms; a size without tiles is named."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from fbqat_hub.export.bundle.runtime.tiles import decode_tiled, norm_of, starts
from fbqat_hub.export.bundle.tiles import decoder_tiles, stage_tile, tiles_of
from fbqat_hub.export.errors import ExportError
from fbqat_hub.families import FAMILIES

# pixels: picture, tile, overlap
CUTS = [((112, 80), 32, 16), ((80, 104), 32, 8), ((40, 72), 40, 8)]


def dc() -> Any:
    """With attention in its lowest stage, so that a tile does not see what is outside."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    )


@pytest.mark.parametrize(("picture", "side", "overlap"), CUTS)
@torch.no_grad()
def test_is_the_tiled_decode_of_diffusers(picture: tuple[int, int], side: int, overlap: int) -> None:
    """To the bit, but for the last strip of an overlap's width, which diffusers blends with tiles of that size."""
    torch.manual_seed(0)
    vae = dc().eval()
    latents = torch.randn(1, 4, *(each // 4 for each in picture))
    vae.enable_tiling(side, side, side - overlap, side - overlap)
    expected = vae.decode(latents).sample[0].numpy()
    vae.disable_tiling()
    overlaps = [0 if each == side else overlap for each in picture]
    tiles = {"size": [side, side], "overlap": overlaps}
    sizes = []

    def decode(part: np.ndarray) -> np.ndarray:
        sizes.append(part.shape)
        return vae.decode(torch.from_numpy(part)).sample[0].numpy()

    found = decode_tiled(decode, latents.numpy(), tiles, picture)
    assert set(sizes) == {(1, 4, side // 4, side // 4)}
    assert found.shape == expected.shape == (3, *picture)
    height, width = (each - overlap for each in picture)
    assert np.array_equal(found[:, :height, :width], expected[:, :height, :width])
    whole = vae.decode(latents).sample[0].numpy()
    assert not np.allclose(found, whole, atol=1e-4)


def test_one_tile_is_the_picture() -> None:
    latents = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
    found = decode_tiled(
        lambda part: np.repeat(part[0, :1], 3, 0), latents, {"size": [4, 4], "overlap": [0, 0]}, (4, 4)
    )
    assert np.array_equal(found, np.repeat(latents[0, :1], 3, 0))


def test_a_ramp_survives() -> None:
    """Equal values on both sides of a blend stay; nothing is shifted."""
    y, x = np.meshgrid(np.arange(28, dtype=np.float32), np.arange(20, dtype=np.float32), indexing="ij")
    latents = (100 * y + x)[None, None]
    tiles = {"size": [16, 8], "overlap": [4, 2]}
    found = decode_tiled(lambda part: np.repeat(part[0], 3, 0), latents, tiles, (28, 20))
    assert np.allclose(found, latents[0])


@pytest.mark.parametrize(
    ("picture", "factor", "side", "tiles"),
    [
        ((512, 512), 8, None, ([128, 128], [32, 32])),
        ((512, 512), 32, None, ([128, 128], [32, 32])),
        ((512, 512), 8, 256, ([256, 256], [128, 128])),
        ((512, 1024), 8, 128, ([128, 128], [32, 64])),
        ((64, 128), 4, 64, ([64, 64], [0, 32])),
        ((520, 520), 8, None, ([120, 120], [40, 40])),  # none of 128
        ((128, 128), 8, None, None),
        ((512, 512), 8, 512, None),
    ],
)
def test_the_smallest_overlap_of_a_quarter_to_a_half_that_fits(picture, factor, side, tiles) -> None:
    found = tiles_of(picture, factor, side)
    assert found == (None if tiles is None else {"size": tiles[0], "overlap": tiles[1]})
    for whole, size, overlap in zip(picture, *tiles, strict=True) if tiles else ():
        assert (whole - size) % (size - overlap) == 0


@pytest.mark.parametrize(
    ("picture", "factor", "side", "says"),
    [
        (
            (512, 512),
            32,
            64,
            "decoder_tile is 64; a latent of this decoder is 32 pixels, so give a multiple of 32 from ",
        ),
        ((512, 512), 8, 100, "decoder_tile is 100; .* a multiple of 8 from 32 on"),
        (
            (520, 512),
            8,
            128,
            r"a picture of 512 x 520 pixels has no tiles of 128 .* decoder_tile can be \d+, .* or 520",
        ),
    ],
)
def test_a_size_without_tiles_names_those_there_are(picture, factor, side, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        tiles_of(picture, factor, side)


@pytest.mark.parametrize(
    ("side", "most"), [(512, 128), (1024, 128), (256, 64), (48, 32), (130, 128), (17, 8), (64, 64)]
)
def test_the_tiles_of_a_stage_cover_it_and_share_two_rows(side: int, most: int) -> None:
    tile = stage_tile(side, most)
    found = starts(side, tile)
    assert len(found) == -(-side // most)
    assert found[0] == 0
    assert found[-1] + tile == side
    assert all(after + 2 <= before + tile for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_norm_of_the_whole_picture_is_a_product_and_a_sum(offset: float) -> None:
    torch.manual_seed(0)
    norm, picture = torch.nn.GroupNorm(4, 8, eps=1e-6), torch.randn(1, 8, 6, 10) + offset
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    stage = {"graph": "stage", "norm": {"groups": 4, "epsilon": 1e-6}}
    norms = {f"stage.{name}": value.detach().numpy() for name, value in norm.named_parameters()}
    scale, shift = norm_of(picture.numpy(), stage, norms)
    with torch.no_grad():
        expected = norm.double()(picture.double()).numpy()
    np.testing.assert_allclose(picture.numpy() * scale + shift, expected, atol=1e-5 * max(offset, 1))


def test_a_decoder_with_group_norms_takes_any_side_from_16_on() -> None:
    pipeline = SimpleNamespace(vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), vae_scale_factor=4)
    call = {"height": 520, "width": 512}
    assert decoder_tiles(pipeline, FAMILIES["flux"], call) == {"size": [128, 128]}
    assert decoder_tiles(pipeline, FAMILIES["flux"], call, 520) is None
    with pytest.raises(ExportError, match="decoder_tile is 8; give 16 or more"):
        decoder_tiles(pipeline, FAMILIES["flux"], call, 8)
