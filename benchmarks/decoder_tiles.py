"""How far a picture decoded in tiles is from one decoded whole: the trained decoders of the tiny teachers, in torch.

    python -m benchmarks.decoder_tiles      # -> benchmarks/results/htp.json, docs/images/decoder-tiles-*.png

Pictures of OpenMoji's test split at 160 pixels go through each autoencoder; tiles have 64, what the decoder was trained
at, and are cut and blended by what travels with a bundle. Float, no graph: what the tiles alone change.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.htp_true_size import RESULTS
from fbqat_hub.evaluation.metrics import psnr
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.bundle.runtime.tiles import decode_tiled
from fbqat_hub.families import FAMILIES
from fbqat_hub.pictures import as_image, pixels
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.openmoji import load_openmoji
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.teachers import resolve_teacher

COMMAND = "python -m benchmarks.decoder_tiles"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIDE, TILE, PICTURES, SHOWN = 160, 64, 48, 4
#: Of 64 pixels; with each of them the tiles end at 160.
OVERLAPS = (16, 32)
# The other families share PixArt-Sigma's decoder.
DECODERS = ("sana", "pixart-sigma")


@torch.no_grad()
def measure(family: str) -> list[Record]:
    """For each overlap, the mean PSNR of the pictures in tiles to the whole ones; and the sheet of some of them."""
    rules = FAMILIES[family]
    pipeline = load_pipeline(resolve_teacher(load_recipe(f"{rules.tiny}").teacher), torch.float32)
    data = load_openmoji(SIDE)["test"]
    chosen = data.select(range(0, len(data), len(data) // PICTURES)).select(range(PICTURES))
    originals = pixels(chosen["image"]).float() / 255
    latents = rules.encode_images(pipeline, 2 * originals - 1)
    decoder = rules.decoder_graph(pipeline.vae)

    def decoded(part: Any) -> Any:
        output: Tensor = decoder.module(*decoder.host_inputs({"latents": torch.from_numpy(part)}).values())[0]
        return output.numpy()

    def pictures(overlap: int | None) -> Tensor:
        tiles = {"size": [TILE] * 2, "overlap": [overlap] * 2} if overlap else None
        made = [torch.from_numpy(decode_tiled(decoded, each[None].numpy(), tiles, [SIDE] * 2)) for each in latents]
        return (torch.stack(made) / 2 + 0.5).clamp(0, 1)

    whole = pictures(None)
    cut = {overlap: pictures(overlap) for overlap in OVERLAPS}
    columns = {"original": originals, "whole": whole, **{f"overlap of {each}": cut[each] for each in OVERLAPS}}
    sheet = {name: [as_image((255 * each).round().byte()) for each in made[:SHOWN]] for name, made in columns.items()}
    comparison_sheet(sheet, chosen["caption"][:SHOWN]).save(IMAGES / f"decoder-tiles-{family}.png")
    return [
        Record(
            suite="htp",
            family=family,
            method="teacher",
            metric="psnr",
            value=float((values := psnr(made, whole)).mean()),
            n=len(values),
            seed=0,
            spread=statistics.stdev(values.tolist()),
            command=COMMAND,
            extra={
                "part": f"{SIDE} px in tiles of {TILE} that overlap by {overlap}",
                "count": len(range(0, SIDE - TILE + 1, TILE - overlap)) ** 2,
                "autoencoder": type(pipeline.vae).__name__,
                "lowest_db": float(values.min()),
                "whole_to_original_db": float(psnr(whole, originals).mean()),
                "tiles_to_original_db": float(psnr(made, originals).mean()),
            },
        )
        for overlap, made in cut.items()
    ]


def main() -> None:
    """The command line, without options."""
    for family in DECODERS:
        records = measure(family)
        write_records(RESULTS, records)
        for record in records:
            print(f"{family:13s} {record.extra['part']}: {record.value:.1f} dB", flush=True)


if __name__ == "__main__":
    main()
