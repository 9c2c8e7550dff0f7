"""A decoder with group norms as stages: described for the runners, and refused where it computes something else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle import decoder
from fbqat_hub.export.bundle.pipeline import Generated
from fbqat_hub.export.bundle.runtime.tiles import as_pixels, stage_map
from fbqat_hub.export.progress import Progress
from fbqat_hub.families import FAMILIES


def without_graphs(stage: Any, described: Any, maps: Any, norms: Any, *_: Any) -> None:
    """In the place of `quantize_stage`: what the stage makes in torch, and nothing exported."""

    def run(feed: Any) -> Any:
        return stage.wrapper.module(*map(torch.from_numpy, feed.values()))[0].numpy()

    for each in maps:
        each[described["makes"]] = stage_map(run, described, each, norms)


@torch.no_grad()
def test_stages_are_described_and_must_make_the_pipeline_s_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5, **kinds)
    latents = torch.randn(1, 4, 32, 24)
    picture = as_pixels(vae.eval().decode(latents / 0.5).sample[0].numpy())
    pipeline, family = SimpleNamespace(vae=vae, vae_scale_factor=2), FAMILIES["pixart-sigma"]
    monkeypatch.setattr(decoder, "quantize_stage", without_graphs)

    def quantized(picture: Any) -> decoder.QuantizedDecoder:
        generated = [Generated(prompt="", items=[], outputs=[], latents=latents, picture=picture)]
        bar = Progress(1, shown=False)
        return decoder.quantize_decoder(pipeline, family, generated, [64, 48], {"size": [32, 32]}, tmp_path, bar)

    found = quantized(picture)
    assert found.tiles is not None
    assert found.stages is not None
    assert found.tiles["psnr_db"] > 50
    assert found.tiles["graphs"] == len(found.stages) == 16
    # what makes 32 x 24 is whole; upsampling to 64 x 48, and what follows, has 2 x 2 tiles
    assert found.tiles["count"] == sum(4 if stage["factor"] * stage["map"][0] == 64 else 1 for stage in found.stages)
    first, second, last = found.stages[0], found.stages[1], found.stages[-1]
    assert first | {"source": "latents", "norm": None, "skip": None, "makes": "stream", "map": [32, 24]} == first
    assert second | {"norm": {"groups": 4, "epsilon": 1e-6}, "tile": [32, 24], "makes": "inner"} == second
    assert last | {"makes": "picture", "map": [64, 48], "tile": [36, 28]} == last
    assert set(found.norms) == {
        f"{each['graph']}.{name}" for each in found.stages if each["norm"] for name in ("weight", "bias")
    }
    with pytest.raises(ExportError, match=r"cut at its group norms, is .* dB from the whole one, .* decoder_tile 64"):
        quantized(255 - picture)
