"""One traced graph, all steps: quantize and audit once, then compile, emulate and compare for each target."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import Feed, FloatGraph
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.export.progress import Progress
from fbqat_hub.families.graph import blocks_of_outputs
from fbqat_hub.quantization.packed import PackedLayer

if TYPE_CHECKING:
    import onnx

    from fbqat_hub.export.onnx.tuning import Tuned

#: Held-out inputs on which blocks and ops are compared; the output is compared on all. The probe, whose every tensor
#: is an output, runs several times slower than the graph that ships.
PROBED = 3

#: Steps of a graph for one target (`compile_chain`); "quantize" comes before them, once.
STEPS = ("reference", "compile", "emulate", "probe")


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """A traced graph and what it is compared on.

    Attributes:
        name: of its files.
        graph: the rewritten float graph.
        layers: its packed layers by module name (none for a graph that was not trained).
        ranges: of every float tensor.
        clipped: ranges in their place where a tensor has 8 bits (`clipping`).
        expected: what torch computes for each held-out input: the graph's output and its blocks' outputs, by name.
    """

    name: str
    graph: FloatGraph
    layers: Mapping[str, PackedLayer]
    ranges: dict[str, tuple[float, float]]
    expected: Sequence[Feed]
    clipped: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(kw_only=True)
class QuantizedGraph:
    """A QDQ graph in a file, and what the certificate has of it whatever the target.

    Attributes:
        name: of its files.
        path: the QDQ graph, an ONNX file.
        precision: that it was quantized with.
        code_bits: module name -> bits of its codes.
        layer_bits: module name -> activation bits at which each of them computes.
        stored_bits: module name -> bits that each of them is stored in.
        block_outputs: as the float graph's.
        expected: as `GraphSource`'s.
        audited: what `audit.audit_qdq` found.
        others: what else the output is compared with, by name, for each held-out input.
        tuning: `Tuned.report` of a graph that was trained.
    """

    name: str
    path: Path
    precision: Precision
    code_bits: Mapping[str, int]
    layer_bits: Mapping[str, int]
    stored_bits: Mapping[str, int]
    block_outputs: Sequence[str]
    expected: Sequence[Feed]
    audited: dict[str, Any]
    others: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    _given: Sequence[Feed] | None = field(default=None, init=False)
    _reference: Sequence[Feed] = field(default=(), init=False)

    def reference(self, qdq: onnx.ModelProto, tensors: Sequence[Any], feeds: Sequence[Feed]) -> Sequence[Feed]:
        """What the exact CPU reference makes of `tensors`, by name, for each of `feeds`.

        Kept for a next target, which is compared on the same feeds.
        """
        from fbqat_hub.export.htp import op_parity
        from fbqat_hub.export.onnx.reference import exact_session

        if self._given is not feeds:
            session = exact_session(op_parity.probe_graph(qdq, tensors))
            self._reference = [_by_float_name(tensors, session.run(None, _of(qdq, feed))) for feed in feeds]
            self._given = feeds
        return self._reference


def quantize_graph(
    source: GraphSource,
    folder: Path,
    precision: Precision,
    progress: Progress,
    tune: Callable[[onnx.ModelProto], Tuned] | None = None,
) -> QuantizedGraph:
    """`source` as a QDQ graph, `<name>.qdq.onnx` in `folder`, audited.

    Args:
        tune: what trains the graph; it is then audited against what was learned, not against the packed layers.

    Raises:
        ExportError: a failed step or audit.
    """
    import onnx

    from fbqat_hub.export.htp import audit
    from fbqat_hub.export.onnx.qdq import insert_qdq

    path = folder / f"{source.name}.qdq.onnx"
    with progress.step(f"{source.name}: quantize"):
        qdq = insert_qdq(source.graph, source.ranges, precision, clipped=source.clipped)
    layers, others, report = source.layers, {}, None
    if tune is not None:
        with progress.step(f"{source.name}: tune"):
            tuned = tune(qdq)
        qdq, layers, others, report = tuned.model, tuned.layers, tuned.outputs, tuned.report
    audited = audit.audit_qdq(qdq, layers, precision)
    onnx.save(qdq, path)
    return QuantizedGraph(
        name=source.name,
        path=path,
        precision=precision,
        code_bits={name: layer.weight_bits for name, layer in source.layers.items()},
        layer_bits={name: precision.layer_bits(name, layer) for name, layer in source.layers.items()},
        stored_bits={name: precision.stored_bits(layer) for name, layer in source.layers.items()},
        block_outputs=source.graph.block_outputs,
        expected=source.expected,
        audited=audited,
        others=others,
        tuning=report,
    )


def compile_chain(
    graphs: Iterable[QuantizedGraph],
    held_out: Sequence[Feed],
    folder: Path,
    target: Target,
    progress: Progress,
    *,
    probe_blocks: int | None = None,
    emulate: int | None = None,
) -> tuple[dict[str, dict[str, Any]], list[Feed]]:
    """Context binaries of graphs that run in order, and every comparison, into `folder`.

    Each graph reads by name from `held_out` and from what the emulator made of the graphs before it. See
    `compile_graph`.

    Args:
        emulate: how many graphs, from the first; all if None. The others are compiled and audited, and compared as the
            exact CPU reference computes them.

    Returns:
        The graphs' sections by name, and the last one's outputs, of each of `held_out`.
    """
    sections = {}
    for place, graph in enumerate(graphs):
        runs = emulate is None or place < emulate
        sections[graph.name], emulated = compile_graph(
            graph, held_out, folder, target, progress, probe_blocks=probe_blocks, emulate=runs
        )
        held_out = [{**feed, **outputs} for feed, outputs in zip(held_out, emulated, strict=True)]
    return sections, emulated


def compile_graph(
    graph: QuantizedGraph,
    held_out: Sequence[Feed],
    folder: Path,
    target: Target,
    progress: Progress,
    *,
    probe_blocks: int | None = None,
    emulate: bool = True,
) -> tuple[dict[str, Any], list[Feed]]:
    """Context binary of a QDQ graph, audits, and every comparison, into `folder`.

    Writes `<name>.qdq.onnx`, `<name>.bin` and `<name>.onnx` (the EPContext node).

    Args:
        held_out: values by name for the comparison, the graph's inputs among them, float32.
        probe_blocks: compare single ops (`op_parity`) and block outputs in the graph's first so many blocks; in all of
            them if None, in none if 0. The probe is a second compilation, whose every tensor is an output and held in
            memory.
        emulate: whether the emulator runs it. If not, `parity` compares the CPU reference with torch alone, and the
            outputs returned are the reference's.

    Returns:
        What was read back, audited and measured, for the certificate (the parity gates are the caller's), and all
        outputs of the emulator, by name, for each of `held_out`. `parity` is of the first output that torch has too.

    Raises:
        ExportError: a failed step, a failed audit, or an op that the HTP computes wrongly.
    """
    import onnx

    from fbqat_hub.export.htp import certificate, compiler, cost, op_parity
    from fbqat_hub.export.onnx.parity import compare as compared_outputs

    name = graph.name
    qdq_path, context = folder / graph.path.name, folder / f"{name}.onnx"
    if qdq_path != graph.path:
        shutil.copyfile(graph.path, qdq_path)
    qdq = onnx.load(qdq_path)
    outputs = [value.name for value in qdq.graph.output]
    output = next(name for name in outputs if name in graph.expected[0])
    compared = [tensor for tensor in op_parity.made_tensors(qdq) if tensor.float_name in (output, *graph.block_outputs)]
    with progress.step(f"{name}: reference"):
        cpu = graph.reference(qdq, compared, held_out)
    scratch = folder / "scratch"
    scratch.mkdir()
    with progress.step(f"{name}: compile"):
        compiled = compile_binary(qdq_path, context, target, scratch, graph.stored_bits)
    emulated, emulator = list(cpu), None
    with progress.step(f"{name}: emulate"):
        if emulate:
            with compiler.emulator(context, target) as emulator:
                emulated = [dict(zip(outputs, emulator.run(_of(qdq, feed)), strict=True)) for feed in held_out]
    errors: list[dict[str, Any]] = []
    probed: list[Feed] = [{}]
    with progress.step(f"{name}: probe"):
        if emulate and probe_blocks != 0:
            errors, probed = _probed(qdq, graph, held_out, scratch / "probe.onnx", target, probe_blocks)
    shutil.rmtree(scratch)

    def compare(tensor: str, runs: Sequence[Feed]) -> dict[str, Any]:
        """One tensor of the first of so many held-out inputs, on the emulator, the CPU and in torch."""
        found = certificate.comparisons(
            *([each[tensor] for each in run[: len(runs)]] for run in (runs, cpu, graph.expected))
        )
        return {name: each for name, each in found.items() if emulate or not name.startswith("emulator")}

    others = {
        f"emulator_vs_{name}": compared_outputs(values, [each[output] for each in emulated])
        for name, values in graph.others.items()
    }
    blocks = {block: compare(block, probed) for block in graph.block_outputs if block in probed[0]}
    layers = {"code_bits": _counted(graph.code_bits), "layer_bits": _counted(graph.layer_bits)}
    section = {
        **compiled,
        "precision": vars(graph.precision) | layers,
        "tensors": cost.describe_tensors(qdq),
        "audit": {"qdq": graph.audited, **compiled["audit"]},
        "cost": cost.cost(qdq) | compiled["cost"],
        "parity": {"held_out_inputs": len(emulated), **compare(output, emulated), **others},
        "blocks": blocks,
        "op_parity": op_parity.summarize(errors) if errors else None,
        "probed_blocks": {
            "probed": len(blocks_of_outputs(list(blocks))),
            "of": len(blocks_of_outputs(graph.block_outputs)),
        },
        "emulator": emulator
        and {
            "hardware": emulator.loaded["hardware"],
            "load_seconds": round(emulator.loaded["seconds"], 3),
            "run_seconds": round(emulator.seconds, 3),
            "peak_rss_mib": certificate.rounded(emulator.peak_rss_mib),
        },
    }
    return section, emulated


def compile_binary(
    qdq: Path, context: Path, target: Target, scratch: Path, stored: Mapping[str, int]
) -> dict[str, Any]:
    """Compile, and audit what came out: the section's `read_back`, `coverage`, `compiler`, parts of `audit`, `cost`."""
    import onnx

    from fbqat_hub.export.htp import audit, certificate, compiler

    worker = compiler.compile_context(qdq, context, target, scratch)
    binary = compiler.rename_binary(context)
    model = onnx.load(context)
    return {
        "read_back": audit.audit_context(model, target),
        "coverage": certificate.coverage(worker.loaded["assigned"]),
        "audit": {"compiled": audit.audit_compiled(scratch / "qnn_graph", stored)},
        "cost": {"binary_bytes": binary.stat().st_size, "spill_fill_bytes": audit.spill_fill_bytes(model)},
        "compiler": {
            "seconds": round(worker.loaded["seconds"], 3),
            "peak_rss_mib": certificate.rounded(worker.peak_rss_mib),
        },
    }


def _probed(
    qdq: onnx.ModelProto,
    graph: QuantizedGraph,
    held_out: Sequence[Feed],
    probe: Path,
    target: Target,
    blocks: int | None,
) -> tuple[list[dict[str, Any]], list[Feed]]:
    """The error of every op in the first `blocks` blocks, gated, and their tensors for the first held-out inputs."""
    import onnx

    from fbqat_hub.export.htp import compiler, op_parity

    prefix = qdq if blocks is None else op_parity.first_blocks(qdq, graph.block_outputs, blocks)
    tensors = op_parity.made_tensors(prefix)
    onnx.save(op_parity.probe_graph(prefix, tensors), probe)
    feeds = [_of(prefix, feed) for feed in held_out[:PROBED]]
    values = compiler.run_probe(probe, feeds, target)
    errors = op_parity.op_errors(prefix, feeds[0], values[0])
    op_parity.gate_ops(errors)
    return errors, [_by_float_name(tensors, each) for each in values]


def _of(model: onnx.ModelProto, values: Feed) -> Feed:
    """The model's inputs among `values`."""
    return {value.name: values[value.name] for value in model.graph.input}


def _by_float_name(made: Sequence[Any], values: Sequence[np.ndarray]) -> Feed:
    """Values of made tensors by the names that these have in the float graph."""
    return {tensor.float_name: value for tensor, value in zip(made, values, strict=True)}


def _counted(bits: Mapping[str, int]) -> dict[str, int]:
    """Bits -> how many layers have them."""
    return {str(each): count for each, count in sorted(Counter(bits.values()).items())}
