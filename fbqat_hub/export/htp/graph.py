"""One graph, all steps: trace, calibrate, quantize, audit, compile, emulate, compare."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import Feed, FloatGraph, GraphWrapper, blocks_of_outputs
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.quantization.packed import PackedLinear


class Progress:
    """A bar over named steps, and the seconds each took."""

    def __init__(self, steps: int, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=steps, disable=not shown, desc="export", unit="step")
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of that name."""
        self.bar.set_postfix_str(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.bar.update()


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
    layers: Mapping[str, PackedLinear]
    ranges: dict[str, tuple[float, float]]
    held_out: Sequence[Feed]
    expected: Sequence[Feed]
    clipped: dict[str, tuple[float, float]] = field(default_factory=dict)


def trace_graph(
    wrapper: GraphWrapper, example: Mapping[str, Any], layers: Mapping[str, PackedLinear]
) -> tuple[FloatGraph, dict[str, int]]:
    """The float graph after all rewrites, and how many places each rewrite changed."""
    from fbqat_hub.export.onnx.float_graph import trace
    from fbqat_hub.export.onnx.rewrite import rewrite

    graph = trace(wrapper, example, layers)
    return graph, rewrite(graph.model)


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

    from fbqat_hub.export.htp import audit, certificate, compiler, op_parity
    from fbqat_hub.export.onnx.qdq import insert_qdq
    from fbqat_hub.export.onnx.reference import exact_session

    name = source.name
    qdq_path, context = folder / f"{name}.qdq.onnx", folder / f"{name}.onnx"
    with progress.step(f"{name}: quantize"):
        qdq = insert_qdq(source.graph, source.ranges, precision, clipped=source.clipped)
        audited = audit.audit_qdq(qdq, source.layers, precision.weight_bits)
        onnx.save(qdq, qdq_path)
    outputs = [value.name for value in qdq.graph.output]
    output = next(name for name in outputs if name in source.expected[0])
    compared = [
        tensor for tensor in op_parity.made_tensors(qdq) if tensor.float_name in (output, *source.graph.block_outputs)
    ]
    prefix = qdq if probe_blocks is None else op_parity.first_blocks(qdq, source.graph.block_outputs, probe_blocks)
    probed = op_parity.made_tensors(prefix)
    with progress.step(f"{name}: reference"):
        session = exact_session(op_parity.probe_graph(qdq, compared))
        cpu = [_by_float_name(compared, session.run(None, feed)) for feed in source.held_out]
        del session
    scratch = folder / "scratch"
    scratch.mkdir()
    with progress.step(f"{name}: compile"):
        compiled = compiler.compile_context(qdq_path, context, target, scratch)
        binary = compiler.rename_binary(context)
        compiled_context = onnx.load(context)
        read_back = audit.audit_context(compiled_context, target)
        audited_compiled = audit.audit_compiled(scratch / "qnn_graph", list(source.layers), precision.weight_bits)
    with progress.step(f"{name}: emulate"), compiler.emulator(context, target) as emulator:
        emulated = [dict(zip(outputs, emulator.run(feed), strict=True)) for feed in source.held_out]
    with progress.step(f"{name}: probe"):
        onnx.save(op_parity.probe_graph(prefix, probed), scratch / "probe.onnx")
        feeds = [{value.name: feed[value.name] for value in prefix.graph.input} for feed in source.held_out[:PROBED]]
        values = compiler.run_probe(scratch / "probe.onnx", feeds, target)
        errors = op_parity.op_errors(prefix, feeds[0], values[0])
        op_parity.gate_ops(errors)
    shutil.rmtree(scratch)
    on_emulator = [_by_float_name(probed, each) for each in values]
    blocks = {
        block: certificate.comparisons(
            *([each[block] for each in run[: len(on_emulator)]] for run in (on_emulator, cpu, source.expected))
        )
        for block in source.graph.block_outputs
        if block in on_emulator[0]
    }
    measured = certificate.comparisons(*([each[output] for each in run] for run in (emulated, cpu, source.expected)))
    section = {
        "read_back": read_back,
        "precision": vars(precision),
        "tensors": certificate.describe_tensors(qdq),
        "coverage": {"all_on_qnn": True, "nodes_on_qnn": audited_compiled["nodes"], "nodes_elsewhere": 0},
        "audit": {"qdq": audited, "compiled": audited_compiled},
        "cost": certificate.cost(qdq)
        | {"binary_bytes": binary.stat().st_size, "spill_fill_bytes": audit.spill_fill_bytes(compiled_context)},
        "parity": {"held_out_inputs": len(emulated), **measured},
        "blocks": blocks,
        "op_parity": op_parity.summarize(errors),
        "probed_blocks": {
            "probed": len(blocks_of_outputs(list(blocks))),
            "of": len(blocks_of_outputs(source.graph.block_outputs)),
        },
        "compiler": {
            "seconds": round(compiled["seconds"], 3),
            "peak_rss_mib": round(compiled["peak_rss_mib"], 1),
        },
        "emulator": {
            "load_seconds": round(emulator.loaded["seconds"], 3),
            "run_seconds": round(emulator.seconds, 3),
            "peak_rss_mib": round(emulator.peak_rss_mib, 1),
        },
    }
    return section, emulated


def _by_float_name(made: Sequence[Any], values: Sequence[np.ndarray]) -> Feed:
    """Values of made tensors by the names that these have in the float graph."""
    return {tensor.float_name: value for tensor, value in zip(made, values, strict=True)}
