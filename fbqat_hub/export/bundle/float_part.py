"""The parts of a pipeline around its transformer as graphs of 16-bit activations: W8A16 unless packed at fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fbqat_hub.export.htp.graph import GraphSource, QuantizedGraph, compile_chain, quantize_graph
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import Feed, as_feed, runnable
from fbqat_hub.export.onnx.precision import PRESETS
from fbqat_hub.export.progress import Progress
from fbqat_hub.families.graph import GraphWrapper, Item
from fbqat_hub.quantization.packed import PackedLayer


@dataclass(frozen=True, kw_only=True)
class QuantizedPart:
    """A part of a pipeline as QDQ graphs that run in order.

    Attributes:
        model_class: what it is made of.
        graphs: in order.
        rewrites: of each graph, how often each rewrite was made.
        held_out: values by name to compare on.
    """

    model_class: str
    graphs: Sequence[QuantizedGraph]
    rewrites: Sequence[Mapping[str, int]]
    held_out: Sequence[Feed]


def quantize_part(
    name: str,
    wrapper: GraphWrapper,
    calibration: Sequence[Item],
    expected: Sequence[Tensor],
    folder: Path,
    bar: Progress,
    layers: Mapping[str, PackedLayer] | None = None,
) -> tuple[QuantizedGraph, Mapping[str, int]]:
    """The QDQ graph of `wrapper`, in `folder`, its ranges from `calibration`; and the rewrites that were made.

    Args:
        expected: the output in torch, of each held-out input.
        layers: packed layers of the wrapper's twin by name, whose codes are kept; others are W8.
    """
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
        expected=[as_feed({wrapper.output_name: output}) for output in expected],
    )
    return quantize_graph(source, folder, PRESETS["w4a16"], bar), rewrites


def compile_part(
    part: QuantizedPart, folder: Path, target: Target, bar: Progress, *, quick: bool = False, emulate: int = 1
) -> dict[str, dict[str, Any]]:
    """The part's graphs in `folder`, compiled for `target`; their sections of the certificate by name, gated.

    Args:
        quick: compare one held-out input and no single ops, and emulate the first `emulate` graphs only.

    Raises:
        ExportError: a failed step, a failed audit or a gate not met.
    """
    from fbqat_hub.export.htp import certificate

    options: dict[str, int] = {"probe_blocks": 0, "emulate": emulate} if quick else {}
    sections, _ = compile_chain(
        part.graphs, part.held_out[:1] if quick else part.held_out, folder, target, bar, **options
    )
    for graph, rewrites in zip(part.graphs, part.rewrites, strict=True):
        section = sections[graph.name]
        section["model"] = {"class": part.model_class, "packed_layers": len(graph.code_bits)}
        section["audit"]["rewrites"] = rewrites
        certificate.gate(section["parity"])
    return sections
