"""The parts of a pipeline around its transformer as graphs of 16-bit activations: W8A16 unless packed at fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.export.htp.graph import GraphSource, compile_graph
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import as_feed, runnable
from fbqat_hub.export.onnx.precision import PRESETS
from fbqat_hub.export.progress import Progress
from fbqat_hub.families.graph import GraphWrapper, Item
from fbqat_hub.quantization.packed import PackedLayer


def build_part(
    name: str,
    model_class: str,
    wrapper: GraphWrapper,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    expected: Sequence[Tensor],
    folder: Path,
    target: Target,
    bar: Progress,
    layers: Mapping[str, PackedLayer] | None = None,
) -> tuple[dict[str, Any], list[Tensor]]:
    """The graph of `wrapper` in `folder`, its ranges from `calibration`.

    Args:
        held_out: to compare on.
        expected: the output in torch, of each of `held_out`.
        layers: packed layers of the wrapper's twin by name, whose codes are kept; others are W8.

    Returns:
        The graph's part of the certificate, gated, and what the emulator made of each of `held_out`.

    Raises:
        ExportError: a failed step, a failed audit or a gate not met.
    """
    from fbqat_hub.export.htp import certificate
    from fbqat_hub.export.onnx.calibration import calibrate
    from fbqat_hub.export.onnx.rewrite import traced

    layers = layers or {}
    with bar.step(f"{name}: trace"):
        graph, rewrites = traced(wrapper, calibration[0], layers)
    with bar.step(f"{name}: calibrate"):
        ranges = calibrate(runnable(graph), [as_feed(wrapper.host_inputs(item)) for item in calibration])
    source = GraphSource(
        name=name,
        graph=graph,
        layers=layers,
        ranges=ranges,
        held_out=[as_feed(wrapper.host_inputs(item)) for item in held_out],
        expected=[as_feed({wrapper.output_name: output}) for output in expected],
    )
    section, emulated = compile_graph(source, folder, target, PRESETS["w4a16"], bar)
    section["model"] = {"class": model_class, "packed_layers": len(layers)}
    section["audit"]["rewrites"] = rewrites
    certificate.gate(section["parity"])
    return section, [torch.from_numpy(each[wrapper.output_name]) for each in emulated]
