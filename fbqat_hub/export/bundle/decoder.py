"""The autoencoder's decoder in a bundle: a graph of the picture or of a tile, or graphs between its group norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbqat_hub.export.bundle.float_part import QuantizedPart, quantize_part
from fbqat_hub.export.bundle.pipeline import Generated, picture_psnr
from fbqat_hub.export.bundle.runtime.tiles import as_pixels, decode_tiled, stage_map, starts
from fbqat_hub.export.bundle.tiles import stage_tile
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.float_graph import as_feed
from fbqat_hub.export.progress import Progress
from fbqat_hub.families import Family
from fbqat_hub.families.decoder import DecoderStage
from fbqat_hub.families.graph import GraphWrapper, Item

#: Of the picture by stages to the whole one, both in torch: the same arithmetic but for rounding, which is that of
#: bfloat16 where the pipeline decodes so.
MIN_STAGES_PSNR_DB = 40.0


@dataclass(frozen=True, kw_only=True)
class QuantizedDecoder:
    """What a bundle decodes with.

    Attributes:
        parts: a graph each.
        tiles: the certificate's `decoder_tiles`.
        stages: the manifest's `decoder_stages` (`runtime.tiles.stage_map`); None of a decoder of one graph.
        norms: weight and bias [C] of their group norms, for `host.safetensors`.
    """

    parts: Sequence[QuantizedPart]
    tiles: Mapping[str, Any] | None
    stages: Sequence[Mapping[str, Any]] | None = None
    norms: Mapping[str, np.ndarray] = field(default_factory=dict)


def quantize_decoder(
    pipeline: Any,
    family: Family,
    generated: Sequence[Generated],
    picture: Sequence[int],
    tiles: Mapping[str, list[int]] | None,
    folder: Path,
    bar: Progress,
) -> QuantizedDecoder:
    """The decoder's graphs at W8A16, calibrated on the latents of the pictures generated and compared for them.

    In tiles: calibrated on all of them, compared for the middle one of each picture. The certificate's `decoder_tiles`
    has `size` and `overlap` of `tiles`, `count` of the calls of a graph for a picture, and `psnr_db` of the picture in
    tiles to the whole one in torch, the mean.

    Args:
        picture: (height, width) in pixels.
        tiles: as `tiles.decoder_tiles` has them.

    Raises:
        ExportError: a failed step, or stages that do not compute what the decoder does.
    """
    rows, columns = (side // pipeline.vae_scale_factor for side in picture)
    latents = [family.unpack_latents(each.latents, rows, columns).float().numpy() for each in generated]
    if tiles is None or "overlap" in tiles:
        return _in_one_graph(pipeline, family, generated, latents, picture, tiles, folder, bar)
    maps = [{"latents": each} for each in latents]
    parts: list[QuantizedPart] = []
    stages: list[dict[str, Any]] = []
    norms: dict[str, np.ndarray] = {}
    for stage in family.decoder_stages(pipeline.vae):
        described = describe_stage(f"decoder_{len(stages):02}", stage, maps[0], tiles["size"])
        norms |= stage_norm(described["graph"], stage)
        parts.append(quantize_stage(stage, described, maps, norms, type(pipeline.vae).__name__, folder, bar))
        stages.append(described)
    psnr = [
        picture_psnr(each.picture, as_pixels(made["picture"][0])) for each, made in zip(generated, maps, strict=True)
    ]
    if not min(psnr) >= MIN_STAGES_PSNR_DB:
        raise ExportError(
            f"the decoder of {type(pipeline.vae).__name__}, cut at its group norms, is {min(psnr):.1f} dB from the "
            f"whole one, at least {MIN_STAGES_PSNR_DB:g} dB is needed: it is no plain AutoencoderKL. decoder_tile "
            f"{max(picture)} decodes in one graph"
        )
    return QuantizedDecoder(
        parts=parts,
        tiles={**tiles, "graphs": len(parts), "count": sum(map(calls, stages)), "psnr_db": _mean(psnr)},
        stages=stages,
        norms=norms,
    )


def describe_stage(
    name: str, stage: DecoderStage, maps: Mapping[str, np.ndarray], most: Sequence[int]
) -> dict[str, Any]:
    """A stage as the manifest has it (`runtime.tiles.stage_map`), with `map`, the sides of its source.

    Args:
        name: of its graph.
        maps: the shapes of its source.
        most: rows and columns of a tile, in what the stage makes, about (`tiles.stage_tile`).
    """
    sides = list(maps[stage.source].shape[2:])
    tile = [stage_tile(side, limit // stage.factor) for side, limit in zip(sides, most, strict=True)]
    norm = stage.norm and {"groups": stage.norm.num_groups, "epsilon": stage.norm.eps}
    return {
        "graph": name,
        "source": stage.source,
        "skip": stage.skip,
        "makes": stage.makes,
        "factor": stage.factor,
        "norm": norm,
        "map": sides,
        "tile": sides if stage.whole else tile,
    }


def stage_norm(name: str, stage: DecoderStage) -> dict[str, np.ndarray]:
    """Weight and bias of a stage's group norm, as `host.safetensors` has them."""
    if stage.norm is None:
        return {}
    parameters = {"weight": stage.norm.weight, "bias": stage.norm.bias}
    return {f"{name}.{kind}": value.detach().cpu().float().numpy() for kind, value in parameters.items()}


def calls(described: Mapping[str, Any]) -> int:
    """Tiles of a stage."""
    return math.prod(len(starts(*each)) for each in zip(described["map"], described["tile"], strict=True))


def quantize_stage(
    stage: DecoderStage,
    described: Mapping[str, Any],
    maps: Sequence[dict[str, np.ndarray]],
    norms: Mapping[str, np.ndarray],
    model_class: str,
    folder: Path,
    bar: Progress,
) -> QuantizedPart:
    """The graph of a stage, calibrated on all tiles of all pictures; what it makes is added to the `maps` of each.

    Args:
        described: it, by `describe_stage`.
        maps: of each picture, by name.
        norms: `stage_norm`'s.
        model_class: of the autoencoder.
    """
    items: list[Item] = []

    def run(feed: dict[str, np.ndarray]) -> np.ndarray:
        items.append({name: torch.from_numpy(value) for name, value in feed.items()})
        made: np.ndarray = _output(stage.wrapper, items[-1]).numpy()
        return made

    for each in maps:
        each[described["makes"]] = stage_map(run, described, each, norms)
    count = calls(described)
    return _part(described["graph"], model_class, stage.wrapper, items, items[count // 2 :: count], folder, bar)


def _in_one_graph(
    pipeline: Any,
    family: Family,
    generated: Sequence[Generated],
    latents: Sequence[np.ndarray],
    picture: Sequence[int],
    tiles: Mapping[str, list[int]] | None,
    folder: Path,
    bar: Progress,
) -> QuantizedDecoder:
    """Of the whole picture, or of a tile that overlaps its neighbours."""
    wrapper = family.decoder_graph(pipeline.vae)
    items: list[Item] = []

    def decode(part: np.ndarray) -> np.ndarray:
        items.append({"latents": torch.from_numpy(part)})
        made: np.ndarray = _output(wrapper, items[-1]).numpy()
        return made

    decoded = [decode_tiled(decode, each, tiles, picture) for each in latents]
    count = len(items) // len(latents)
    part = _part("decoder", type(pipeline.vae).__name__, wrapper, items, items[count // 2 :: count], folder, bar)
    psnr = [picture_psnr(each.picture, as_pixels(made)) for each, made in zip(generated, decoded, strict=True)]
    report = {**tiles, "graphs": 1, "count": count, "psnr_db": _mean(psnr)} if tiles else None
    return QuantizedDecoder(parts=[part], tiles=report)


def _part(
    name: str,
    model_class: str,
    wrapper: GraphWrapper,
    items: Sequence[Item],
    compared: Sequence[Item],
    folder: Path,
    bar: Progress,
) -> QuantizedPart:
    expected = [_output(wrapper, item) for item in compared]
    graph, rewrites = quantize_part(name, wrapper, items, expected, folder, bar)
    held_out = [as_feed(wrapper.host_inputs(item)) for item in compared]
    return QuantizedPart(model_class=model_class, graphs=[graph], rewrites=[rewrites], held_out=held_out)


@torch.no_grad()
def _output(wrapper: GraphWrapper, item: Item) -> Tensor:
    output: Tensor = wrapper.module(*wrapper.host_inputs(item).values())[0]
    return output


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)
