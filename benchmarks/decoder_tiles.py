"""How far a picture decoded in tiles is from one decoded whole: the trained decoders of the tiny teachers, in torch.

    python -m benchmarks.decoder_tiles      # -> benchmarks/results/htp.json, docs/images/decoder-tiles-*.png

Pictures of OpenMoji's test split at 160 pixels go through each autoencoder; tiles have 64, what the decoder was trained
at, and are cut and put together by what travels with a bundle. Float, no graph: what the tiles alone change. Of the
decoder with group norms several ways to get their mean and variance are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.htp_true_size import RESULTS
from fbqat_hub.evaluation.metrics import psnr
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.bundle.decoder import calls, describe_stage, stage_norm
from fbqat_hub.export.bundle.runtime.tiles import decode_stages, decode_tiled, stage_map
from fbqat_hub.families import FAMILIES
from fbqat_hub.families.decoder import DecoderStage
from fbqat_hub.families.graph import GraphWrapper
from fbqat_hub.pictures import as_image, pixels
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.openmoji import load_openmoji
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.teachers import resolve_teacher

COMMAND = "python -m benchmarks.decoder_tiles"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIDE, TILE, PICTURES, SHOWN = 160, 64, 48, 4
#: How often mean and variance are gathered; as often as there are norms they are exact, but for the tiles' edges.
PASSES = (1, 2, 6, 17)
#: Of 64 pixels; with each of them the tiles end at 160.
OVERLAPS = (16, 32)
# The other families share PixArt-Sigma's decoder.
DECODERS = ("sana", "pixart-sigma")


@dataclass(frozen=True)
class Way:
    """A way to decode: its name, calls of a graph for a picture, and the pictures [N, 3, H, W] in [0, 1]."""

    name: str
    calls: int
    pictures: Tensor


class _Norm(nn.Module):
    """A group norm that keeps what it sees, and takes mean and mean square [N, groups] from outside where it is told.

    Attributes:
        told: those, or None.
        seen: of each call.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm
        self.told: tuple[Tensor, Tensor] | None = None
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, picture: Tensor) -> Tensor:
        """As `nn.GroupNorm`."""
        groups = picture.unflatten(1, (self.norm.num_groups, -1)).flatten(2)
        self.seen.append((groups.mean(-1), groups.square().mean(-1)))
        mean, square = self.told or self.seen[-1]
        narrow = (square - mean.square()).clamp_min(0).add(self.norm.eps).rsqrt()
        normed = (groups - mean[..., None]) * narrow[..., None]
        weight, bias = (each[:, None, None] for each in (self.norm.weight, self.norm.bias))
        return normed.reshape(picture.shape) * weight + bias


class Decoder:
    """An autoencoder's decoder over all pictures at once, whole and in tiles that overlap.

    Args:
        wrapper: as `Family.decoder_graph` has it.
    """

    def __init__(self, wrapper: GraphWrapper) -> None:
        self.module = wrapper.module
        self.norms: list[_Norm] = []
        for parent in list(self.module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.GroupNorm):
                    self.norms.append(_Norm(child))
                    setattr(parent, name, self.norms[-1])

    def whole(self, latents: Tensor, side: int) -> Tensor:
        """Pictures [N, 3, side, side] of latents."""
        output: Tensor = self.module(latents)[0]
        return output.unflatten(2, (side, side))

    def tiled(self, latents: Tensor, overlap: int) -> Tensor:
        """Pictures [N, 3, SIDE, SIDE], blended as a bundle does it."""
        parts: list[Tensor] = []

        def decode(part: np.ndarray) -> np.ndarray:  # the first picture's; the others' tiles are at the same places
            parts.append(self.whole(torch.from_numpy(part), TILE))
            return parts[-1][0].numpy()

        def decoded(place: int) -> Callable[[np.ndarray], np.ndarray]:
            left = iter(parts)
            return lambda _: next(left)[place].numpy()

        tiles = {"size": [TILE] * 2, "overlap": [overlap] * 2}
        ways = [decode, *(decoded(place) for place in range(1, len(latents)))]
        return torch.from_numpy(np.stack([decode_tiled(each, latents.numpy(), tiles, [SIDE] * 2) for each in ways]))

    def statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and mean square of each norm's groups over all calls since the last time, a picture each."""
        found = []
        for norm in self.norms:
            means, squares = zip(*norm.seen, strict=True)
            found.append((torch.stack(means).mean(0), torch.stack(squares).mean(0)))
            norm.seen = []
        return found

    def tell(self, statistics: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Let the norms take these, or what they see if None."""
        for place, norm in enumerate(self.norms):
            norm.told = None if statistics is None else statistics[place]
            norm.seen = []


def latents_of(rules: Any, pipeline: Any, pictures: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The pictures, in [0, 1], and their latents."""
    originals = pixels(pictures).float() / 255
    return originals, rules.encode_images(pipeline, 2 * originals - 1)


def norms_told(decoder: Decoder, latents: Tensor, seen_before: Tensor) -> Iterator[Way]:
    """Tiles whose group norms are told mean and variance: of other pictures, of the latents made small, of tiles."""
    count, overlap = _tiles(OVERLAPS[0]), OVERLAPS[0]
    decoder.tell(None)
    decoder.whole(seen_before, SIDE)
    means = [tuple(each.mean(0, keepdim=True) for each in pair) for pair in decoder.statistics()]
    decoder.tell([(mean, square) for mean, square in means])
    yield Way("norms of other pictures, the mean", count, decoder.tiled(latents, overlap))
    side = TILE * latents.shape[-1] // SIDE
    small = F.interpolate(latents, size=side, mode="nearest-exact")
    before, after = (torch.std_mean(each, dim=(2, 3), keepdim=True) for each in (latents, small))
    decoder.tell(None)
    decoder.whole((small - after[1]) / after[0] * before[0] + before[1], TILE)
    decoder.tell(decoder.statistics())
    yield Way("norms of the latents made small", count + 1, decoder.tiled(latents, overlap))
    decoder.tell(None)
    decoder.tiled(latents, overlap)
    for passes in range(1, PASSES[-1] + 1):
        decoder.tell(decoder.statistics())
        pictures = decoder.tiled(latents, overlap)
        if passes in PASSES:
            plural = f", gathered {passes} times" if passes > 1 else ""
            yield Way(f"norms averaged over all tiles{plural}", (passes + 1) * count, pictures)


def cut_at_norms(stages: Sequence[DecoderStage], latents: Tensor) -> Way:
    """By graphs between the group norms, which are of the whole picture: how a bundle does it."""
    wrappers: dict[str, GraphWrapper] = {}
    described: list[dict[str, Any]] = []
    norms: dict[str, np.ndarray] = {}

    def graph(name: str) -> Any:
        module = wrappers[name].module
        return lambda feed: module(*(torch.from_numpy(each) for each in feed.values()))[0].numpy()

    maps = {"latents": latents[:1].numpy()}
    for stage in stages:
        name = str(len(described))
        wrappers[name] = stage.wrapper
        described.append(describe_stage(name, stage, maps, [TILE] * 2))
        norms |= stage_norm(name, stage)
        maps[stage.makes] = stage_map(graph(name), described[-1], maps, norms)
    made = [decode_stages(graph, each[None].numpy(), described, norms) for each in latents]
    return Way("cut at the norms, tiles of about 64", sum(map(calls, described)), torch.from_numpy(np.stack(made)))


def _tiles(overlap: int) -> int:
    return len(range(0, SIDE - TILE + 1, TILE - overlap)) ** 2


@torch.no_grad()
def measure(family: str) -> list[Record]:
    """For each way, the mean PSNR of the pictures in tiles to the whole ones; and the sheet of some of them."""
    rules = FAMILIES[family]
    pipeline = load_pipeline(resolve_teacher(load_recipe(f"{rules.tiny}").teacher), torch.float32)
    data = load_openmoji(SIDE)
    chosen, others = (
        data[split].select(range(0, len(data[split]), len(data[split]) // PICTURES)).select(range(PICTURES))
        for split in ("test", "train")
    )
    originals, latents = latents_of(rules, pipeline, chosen["image"])
    decoder = Decoder(rules.decoder_graph(pipeline.vae))
    whole = _shown(decoder.whole(latents, SIDE))
    decoder.tell(None)
    ways = [
        Way(f"tiles of {TILE} that overlap by {overlap}", _tiles(overlap), decoder.tiled(latents, overlap))
        for overlap in OVERLAPS
    ]
    if decoder.norms:
        ways += norms_told(decoder, latents, latents_of(rules, pipeline, others["image"])[1])
        ways.append(cut_at_norms(rules.decoder_stages(pipeline.vae), latents))
    made = {way.name: _shown(way.pictures) for way in ways}
    columns = {"original": originals, "whole": whole, **{name: made[name] for name in made if "gathered" not in name}}
    sheet = {name: [as_image((255 * each).round().byte()) for each in every[:SHOWN]] for name, every in columns.items()}
    comparison_sheet(sheet, chosen["caption"][:SHOWN]).save(IMAGES / f"decoder-tiles-{family}.png")
    return [
        Record(
            suite="htp",
            family=family,
            method="teacher",
            metric="psnr",
            value=float((values := psnr(made[way.name], whole)).mean()),
            n=len(values),
            seed=0,
            spread=statistics.stdev(values.tolist()),
            command=COMMAND,
            extra={
                "part": f"{SIDE} px: {way.name}",
                "calls": way.calls,
                "autoencoder": type(pipeline.vae).__name__,
                "lowest_db": float(values.min()),
                "whole_to_original_db": float(psnr(whole, originals).mean()),
                "tiles_to_original_db": float(psnr(made[way.name], originals).mean()),
            },
        )
        for way in ways
    ]


def _shown(pictures: Tensor) -> Tensor:
    return (pictures / 2 + 0.5).clamp(0, 1)


def main() -> None:
    """The command line, without options."""
    records = [record for family in DECODERS for record in measure(family)]
    write_records(RESULTS, records, drop=lambda each: "tiles_to_original_db" in each.extra)
    for record in records:
        print(f"{record.family:13s} {record.extra['part']}: {record.value:.1f} dB", flush=True)


if __name__ == "__main__":
    main()
