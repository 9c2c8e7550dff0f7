"""One call from a packed transformer to a context binary with its certificate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fbqat_hub.export.folder import staging
from fbqat_hub.export.htp.checks import check_asked, check_model, check_samples, check_tuning
from fbqat_hub.export.htp.graph import STEPS, GraphSource, QuantizedGraph, compile_chain, quantize_graph
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import Feed, FloatGraph, as_feed, packed_layers, runnable
from fbqat_hub.export.onnx.items import check_items, torch_outputs
from fbqat_hub.export.onnx.precision import LOWEST, Precision
from fbqat_hub.export.progress import Progress
from fbqat_hub.families import Family
from fbqat_hub.families.graph import GraphWrapper, Item

if TYPE_CHECKING:
    from fbqat_hub.export.onnx.tuning import Tuning

#: Calibration inputs that are kept apart for `allocate`.
ALLOCATION_INPUTS = 4


def export_htp(
    transformer: nn.Module,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    output_dir: str | os.PathLike[str],
    *,
    soc: str = "sm8750",
    precision: Precision | None = None,
    target_db: float | None = None,
    graphs: int = 1,
    probe_blocks: int | None = None,
    tuning: Tuning | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Export a packed transformer to a QNN HTP context binary, and prove on the x86 emulator that it computes it.

    Makes a folder with `transformer.qdq.onnx` (QDQ with the model's own 4-bit codes and scales), `transformer.bin`
    (the context binary), `transformer.onnx` (the EPContext node that loads it in ONNX Runtime), `certificate.json`
    and `certificate.md`.

    Args:
        transformer: a packed transformer of a family in `FAMILIES`; not changed.
        calibration: keyword arguments of its forward, each a tensor of batch 1, all items of the same shapes. They
            set the activation ranges that training did not; a layer's own static `input_scale` is used exactly.
        held_out: other items of the same kind, at several timesteps, on which the certificate is measured.
        output_dir: must not exist, or be empty. Appears only when everything passed.
        soc: a key of `fbqat_hub.export.htp.targets.TARGETS`.
        precision: which ops compute at how many activation bits, besides the layers that the family keeps at 16; the
            default is W4A8 with 16 bits between the layers.
        target_db: start from 16 bits everywhere and give 8 where that saves most for its noise, while the exact CPU
            reference keeps this SQNR to torch (`allocation.allocate`; `precision` then gives the weights' storage and
            the layers that stay at 16 in any case).
        graphs: into how many graphs to split the model along its blocks, `transformer_0` and so on, run in order.
            The certificate's `parity` is then that of the whole chain on the emulator against torch (against the CPU
            reference: of the last graph); `parts` has each graph's own.
        probe_blocks: see `compile_graph`.
        tuning: train the QDQ graph before it is compiled (`tuning.tune_graph`); not with several `graphs`.
        progress: show a bar.

    Returns:
        The certificate, as written to `certificate.json`.

    Raises:
        HTPUnavailableError: a needed package cannot be imported; says what to install.
        ValueError, ExportError: bad input, a failed step, a failed audit or a gate not met; nothing is left at
            `output_dir`.
    """
    (target,) = check_asked(output_dir, soc, graphs=graphs, probe_blocks=probe_blocks)
    check_tuning(tuning.steps if tuning else 0, graphs)
    precision = precision or Precision()
    family = check_model(transformer, precision.a16_layers, graphs)
    check_items("calibration", calibration, family.constant_inputs)
    check_items("held_out", held_out, family.constant_inputs)
    check_samples(target_db, len(calibration))
    from fbqat_hub.export.htp import certificate

    with staging(output_dir) as folder, Progress(2 + graphs * (1 + len(STEPS)) + bool(tuning), progress) as bar:
        quantized = quantize_transformer(
            transformer,
            family,
            family.graph(transformer, calibration[0]),
            calibration,
            held_out,
            folder,
            precision,
            bar,
            target_db=target_db,
            graphs=graphs,
            tuning=tuning,
        )
        section, _ = compile_transformer(quantized, folder, target, bar, probe_blocks=probe_blocks)
        return certificate.write(folder, target, section, bar.seconds)


@dataclass(frozen=True, kw_only=True)
class QuantizedTransformer:
    """A transformer as QDQ graphs that run in order.

    Attributes:
        graphs: in order.
        held_out: values by name to compare on.
        wrapper: of the traced graph.
        facts: what the certificate says of it whatever the target.
        rewrites: how often each rewrite was made.
        timesteps: of `held_out`.
    """

    graphs: Sequence[QuantizedGraph]
    held_out: Sequence[Feed]
    wrapper: GraphWrapper
    facts: dict[str, Any]
    rewrites: dict[str, int]
    timesteps: list[float]


@dataclass(frozen=True)
class _Quantization:
    """How the activations of a graph are quantized: ranges of every tensor, those in 8 bits, and where 8 bits are."""

    ranges: dict[str, tuple[float, float]]
    clipped: dict[str, tuple[float, float]]
    precision: Precision
    inputs: int
    report: dict[str, Any] | None


def quantize_transformer(
    transformer: nn.Module,
    family: Family,
    wrapper: GraphWrapper,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    folder: Path,
    precision: Precision,
    progress: Progress,
    *,
    target_db: float | None = None,
    graphs: int = 1,
    tuning: Tuning | None = None,
) -> QuantizedTransformer:
    """The transformer as QDQ graphs, in `folder`.

    Args:
        wrapper: `Family.graph` of it.

    The others are as `export_htp`.
    """
    from fbqat_hub.export.onnx.rewrite import traced
    from fbqat_hub.export.onnx.split import split_graph

    precision = replace(precision, a16_layers=(*family.a16_layers, *precision.a16_layers))
    with progress.step("transformer: trace"):
        graph, rewrites = traced(wrapper, calibration[0], packed_layers(transformer))
        parts = {"transformer": graph}
        if graphs != 1:
            parts = {f"transformer_{index}": part for index, part in enumerate(split_graph(graph, graphs))}
    chosen = _quantization(transformer, graph, wrapper, calibration, precision, target_db, progress)
    expected = torch_outputs(transformer, held_out, family.blocks(transformer))
    tune = None
    if tuning is not None:
        from fbqat_hub.export.onnx.tuning import tune_graph

        tune = partial(
            tune_graph,
            layers={graph.module_names[key]: layer for key, layer in graph.layers.items()},
            tuning=tuning,
            wrapper=wrapper,
            held_out=held_out,
            packed=[each[wrapper.output_name] for each in expected],
            progress=progress.shown,
        )
    sources = (
        GraphSource(
            name=name,
            graph=part,
            layers={part.module_names[key]: layer for key, layer in part.layers.items()},
            ranges=chosen.ranges,
            clipped=chosen.clipped,
            expected=expected,
        )
        for name, part in parts.items()
    )
    quantized = [quantize_graph(source, folder, chosen.precision, progress, tune) for source in sources]
    return QuantizedTransformer(
        graphs=quantized,
        held_out=[as_feed(wrapper.host_inputs(item)) for item in held_out],
        wrapper=wrapper,
        facts={
            "model": {"class": type(transformer).__name__, "packed_layers": len(graph.layers)},
            "allocation": chosen.report,
            "calibration_inputs": chosen.inputs,
            "tuning": quantized[0].tuning,
        },
        rewrites=rewrites,
        timesteps=[round(float(item["timestep"].reshape(-1)[0]), 4) for item in held_out],
    )


def compile_transformer(
    quantized: QuantizedTransformer,
    folder: Path,
    target: Target,
    progress: Progress,
    *,
    probe_blocks: int | None = None,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The transformer's graphs in `folder`, compiled for `target`.

    Returns:
        Its part of the certificate, gated, and what the emulator made of each held-out input.
    """
    from fbqat_hub.export.htp import certificate

    sections, made = compile_chain(
        quantized.graphs, quantized.held_out, folder, target, progress, probe_blocks=probe_blocks
    )
    section = certificate.joined(sections) if len(sections) > 1 else next(iter(sections.values()))
    section |= quantized.facts
    section["audit"]["rewrites"] = quantized.rewrites
    section["parity"]["timesteps"] = quantized.timesteps
    section["parity"]["thresholds_db"] = certificate.thresholds()
    certificate.gate(section["parity"])
    return section, [each[quantized.wrapper.output_name] for each in made]


def _quantization(
    transformer: nn.Module,
    graph: FloatGraph,
    wrapper: GraphWrapper,
    calibration: Sequence[Item],
    precision: Precision,
    target_db: float | None,
    progress: Progress,
) -> _Quantization:
    """Ranges from `calibration`; with `target_db` some of it is kept apart, and chooses where 8 bits are enough."""
    from fbqat_hub.export.onnx.allocation import allocate
    from fbqat_hub.export.onnx.calibration import calibrate
    from fbqat_hub.export.onnx.clipping import clipped_ranges, tensors_at_8_bits
    from fbqat_hub.export.onnx.qdq import relu_ranges

    # what precision is chosen on must not have set the ranges: a range fits the inputs it was taken from too well
    apart = range(0, len(calibration), max(2, len(calibration) // ALLOCATION_INPUTS))[:ALLOCATION_INPUTS]
    chosen_on = apart if target_db is not None else range(0)
    feeds: list[Feed] = [as_feed(wrapper.host_inputs(item)) for item in calibration]
    seen = [feed for index, feed in enumerate(feeds) if index not in chosen_on]
    with progress.step("transformer: calibrate"):
        ranges = calibrate(runnable(graph), seen)
        at_8_bits = tensors_at_8_bits(graph, precision if target_db is None else LOWEST)
        clipped = clipped_ranges(runnable(graph), seen, relu_ranges(graph.model, ranges), at_8_bits)
    if target_db is None:
        return _Quantization(ranges, clipped, precision, len(seen), None)
    with progress.step("transformer: allocate"):
        outputs = torch_outputs(transformer, [calibration[index] for index in chosen_on], ())
        precision, report = allocate(
            graph,
            ranges,
            [feeds[index] for index in chosen_on],
            [each["sample"] for each in outputs],
            start=precision,
            clipped=clipped,
            target_db=target_db,
        )
    return _Quantization(ranges, clipped, precision, len(seen), report | {"inputs": len(chosen_on)})
