"""One traced graph, all steps: quantize, audit, compile, emulate, compare."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
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

#: Held-out inputs on which blocks and ops are compared; the output is compared on all. The probe, whose every tensor
#: is an output, runs several times slower than the graph that ships.
PROBED = 3

#: Steps of `compile_graph`.
STEPS = ("quantize", "reference", "compile", "emulate", "probe")


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """A traced graph and what it is compared on.

    Attributes:
        name: of its files.
        graph: the rewritten float graph.
        layers: its packed layers by module name (none for a graph that was not trained).
        ranges: of every float tensor.
        clipped: ranges in their place where a tensor has 8 bits (`clipping`).
        held_out: graph inputs for the comparison.
        expected: what torch computes for each of `held_out`: the graph's output and its blocks' outputs, by name.
    """

    name: str
    graph: FloatGraph
    layers: Mapping[str, PackedLayer]
    ranges: dict[str, tuple[float, float]]
    held_out: Sequence[Feed]
    expected: Sequence[Feed]
    clipped: dict[str, tuple[float, float]] = field(default_factory=dict)


def compile_graph(
    source: GraphSource,
    folder: Path,
    target: Target,
    precision: Precision,
    progress: Progress,
    *,
    probe_blocks: int | None = None,
) -> tuple[dict[str, Any], list[Feed]]:
    """QDQ, audits, context binary, and every comparison, into `folder`.

    Writes `<name>.qdq.onnx`, `<name>.bin` and `<name>.onnx` (the EPContext node).

    Args:
        probe_blocks: compare single ops (`op_parity`) and block outputs in the graph's first so many blocks; in all of
            them if None. The probe is a second compilation, whose every tensor is an output and held in memory.

    Returns:
        What was read back, audited and measured, for the certificate (the parity gates are the caller's), and all
        outputs of the emulator, by name, for each of `held_out`. `parity` is of the first output that torch has too.

    Raises:
        ExportError: a failed step, a failed audit, or an op that the HTP computes wrongly.
    """
    import onnx

    from fbqat_hub.export.htp import audit, certificate, compiler, cost, op_parity
    from fbqat_hub.export.onnx.qdq import insert_qdq
    from fbqat_hub.export.onnx.reference import exact_session

    name = source.name
    qdq_path, context = folder / f"{name}.qdq.onnx", folder / f"{name}.onnx"
    with progress.step(f"{name}: quantize"):
        qdq = insert_qdq(source.graph, source.ranges, precision, clipped=source.clipped)
        audited = audit.audit_qdq(qdq, source.layers, precision)
        onnx.save(qdq, qdq_path)
    outputs = [value.name for value in qdq.graph.output]
    output = next(name for name in outputs if name in source.expected[0])
    compared = [
        tensor for tensor in op_parity.made_tensors(qdq) if tensor.float_name in (output, *source.graph.block_outputs)
    ]
    with progress.step(f"{name}: reference"):
        session = exact_session(op_parity.probe_graph(qdq, compared))
        cpu = [_by_float_name(compared, session.run(None, feed)) for feed in source.held_out]
        del session
    scratch = folder / "scratch"
    scratch.mkdir()
    with progress.step(f"{name}: compile"):
        stored = {key: precision.stored_bits(layer) for key, layer in source.layers.items()}
        compiled = _compiled(qdq_path, context, target, scratch, stored)
    with progress.step(f"{name}: emulate"), compiler.emulator(context, target) as emulator:
        emulated = [dict(zip(outputs, emulator.run(feed), strict=True)) for feed in source.held_out]
    with progress.step(f"{name}: probe"):
        errors, probed = _probed(qdq, source, scratch / "probe.onnx", target, probe_blocks)
    shutil.rmtree(scratch)

    def compare(tensor: str, runs: Sequence[Feed]) -> dict[str, Any]:
        """One tensor of the first of so many held-out inputs, on the emulator, the CPU and in torch."""
        return certificate.comparisons(
            *([each[tensor] for each in run[: len(runs)]] for run in (runs, cpu, source.expected))
        )

    blocks = {block: compare(block, probed) for block in source.graph.block_outputs if block in probed[0]}
    code_bits = Counter(layer.weight_bits for layer in source.layers.values())
    section = {
        **compiled,
        "precision": vars(precision) | {"code_bits": {str(bits): count for bits, count in sorted(code_bits.items())}},
        "tensors": cost.describe_tensors(qdq),
        "audit": {"qdq": audited, **compiled["audit"]},
        "cost": cost.cost(qdq) | compiled["cost"],
        "parity": {"held_out_inputs": len(emulated), **compare(output, emulated)},
        "blocks": blocks,
        "op_parity": op_parity.summarize(errors),
        "probed_blocks": {
            "probed": len(blocks_of_outputs(list(blocks))),
            "of": len(blocks_of_outputs(source.graph.block_outputs)),
        },
        "emulator": {
            "hardware": emulator.loaded["hardware"],
            "load_seconds": round(emulator.loaded["seconds"], 3),
            "run_seconds": round(emulator.seconds, 3),
            "peak_rss_mib": certificate.rounded(emulator.peak_rss_mib),
        },
    }
    return section, emulated


def _compiled(qdq: Path, context: Path, target: Target, scratch: Path, stored: Mapping[str, int]) -> dict[str, Any]:
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
    qdq: onnx.ModelProto, source: GraphSource, probe: Path, target: Target, blocks: int | None
) -> tuple[list[dict[str, Any]], list[Feed]]:
    """The error of every op in the first `blocks` blocks, gated, and their tensors for the first held-out inputs."""
    import onnx

    from fbqat_hub.export.htp import compiler, op_parity

    prefix = qdq if blocks is None else op_parity.first_blocks(qdq, source.graph.block_outputs, blocks)
    tensors = op_parity.made_tensors(prefix)
    onnx.save(op_parity.probe_graph(prefix, tensors), probe)
    feeds = [{value.name: feed[value.name] for value in prefix.graph.input} for feed in source.held_out[:PROBED]]
    values = compiler.run_probe(probe, feeds, target)
    errors = op_parity.op_errors(prefix, feeds[0], values[0])
    op_parity.gate_ops(errors)
    return errors, [_by_float_name(tensors, each) for each in values]


def _by_float_name(made: Sequence[Any], values: Sequence[np.ndarray]) -> Feed:
    """Values of made tensors by the names that these have in the float graph."""
    return {tensor.float_name: value for tensor, value in zip(made, values, strict=True)}
