"""The parts of a pipeline around its transformer, which were not trained for 4 bits, as W8A16 graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.export.htp.graph import GraphSource, compile_graph
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import as_feed
from fbqat_hub.export.onnx.precision import PRESETS
from fbqat_hub.export.progress import Progress
from fbqat_hub.families.graph import GraphWrapper, Item


def build_part(
    name: str,
    model_class: str,
    wrapper: GraphWrapper,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    folder: Path,
    target: Target,
    bar: Progress,
) -> dict[str, Any]:
    """The graph of `wrapper` in `folder`, its ranges from `calibration`; its part of the certificate, gated.

    Raises:
        ExportError: a failed step, a failed audit or a gate not met.
    """
    from fbqat_hub.export.htp import certificate
    from fbqat_hub.export.onnx.calibration import calibrate
    from fbqat_hub.export.onnx.rewrite import traced

    with bar.step(f"{name}: trace"):
        graph, rewrites = traced(wrapper, calibration[0], {})
    with bar.step(f"{name}: calibrate"):
        ranges = calibrate(graph.model, [as_feed(wrapper.host_inputs(item)) for item in calibration])
    inputs = [wrapper.host_inputs(item) for item in held_out]
    with torch.no_grad():
        outputs = [wrapper.module(*each.values())[0] for each in inputs]
    source = GraphSource(
        name=name,
        graph=graph,
        layers={},
        ranges=ranges,
        held_out=[as_feed(each) for each in inputs],
        expected=[as_feed({wrapper.output_name: output}) for output in outputs],
    )
    section, _ = compile_graph(source, folder, target, PRESETS["w8a16"], bar)
    section["model"] = {"class": model_class, "packed_layers": 0}
    section["audit"]["rewrites"] = rewrites
    certificate.gate(section["parity"])
    return section
