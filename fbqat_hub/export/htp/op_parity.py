"""Parity op by op: does each op, given what the emulator gave it, return what exact arithmetic returns?

End to end, an op that is silently wrong hides among honest rounding that later layers amplify. So the graph is
compiled once more with every quantized tensor as an output (the probe), and each op is then computed exactly on the
CPU from the *emulator's* inputs of that op. What is left is the op's own error, wherever in the network it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.reference import exact_session
from fbqat_hub.families.graph import block_of, blocks_of_outputs

#: Root-mean-square error of one op over the width of its output's range. One code of an 8-bit tensor is 1/255 of it.
#: Measured on tiny Sanas, outlier-ridden ones among them: at most 0.66 codes at 8 bits (RMSNorm, 4-bit convolutions),
#: 0.18 of an 8-bit code at 16 bits (products with one 8-bit operand). A wrong op is off by tens of codes.
MAX_OP_ERROR = 2 / 255


@dataclass(frozen=True)
class MadeTensor:
    """A quantized tensor as its op makes it: the DequantizeLinear's output, the tensor's name in the float graph, the
    op, and its range's width."""

    name: str
    float_name: str
    op_type: str
    bits: int
    width: float


def made_tensors(qdq: onnx.ModelProto) -> list[MadeTensor]:
    """Every tensor that an op of the QDQ graph makes (conversions from one encoding to another are no ops)."""
    graph = qdq.graph
    producer = {name: node for node in graph.node for name in node.output}
    dequantized = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    constants = {item.name: item for item in graph.initializer}
    made = []
    for node in graph.node:
        op = producer.get(node.input[0])
        if node.op_type != "QuantizeLinear" or op is None or op.op_type == "DequantizeLinear":
            continue
        bits = 8 * numpy_helper.to_array(constants[node.input[2]]).itemsize
        width = float(numpy_helper.to_array(constants[node.input[1]])) * (2**bits - 1)
        float_name = node.input[0].removesuffix("/float")
        made.append(MadeTensor(dequantized[node.output[0]], float_name, op.op_type, bits, width))
    return made


def first_blocks(qdq: onnx.ModelProto, block_outputs: Sequence[str], count: int) -> onnx.ModelProto:
    """The QDQ graph up to where its first `count` blocks are made, without an output; all of it if it has no more.

    Args:
        qdq: the graph.
        block_outputs: names in the float graph of its blocks' outputs, in order (`FloatGraph.block_outputs`).
        count: at least 1.
    """
    blocks = blocks_of_outputs(block_outputs)
    if count >= len(blocks):
        return qdq
    last = {tensor.name for tensor in made_tensors(qdq) if block_of(tensor.float_name) in blocks[:count]}
    nodes = list(qdq.graph.node)
    inside = nodes[: 1 + max(place for place, node in enumerate(nodes) if node.output[0] in last)]
    read = {name for node in inside for name in node.input}
    constants = [item for item in qdq.graph.initializer if item.name in read]
    inputs = [value for value in qdq.graph.input if value.name in read]
    first = helper.make_model(
        helper.make_graph(inside, qdq.graph.name, inputs, [], constants), opset_imports=list(qdq.opset_import)
    )
    first.ir_version = qdq.ir_version
    return first


def probe_graph(qdq: onnx.ModelProto, tensors: Sequence[MadeTensor]) -> onnx.ModelProto:
    """The QDQ graph with `tensors` (of `made_tensors`) as its outputs, in that order."""
    probe = onnx.ModelProto()
    probe.CopyFrom(qdq)
    del probe.graph.output[:]
    for tensor in tensors:
        probe.graph.output.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, None))
    return onnx.shape_inference.infer_shapes(probe)


def local_graph(qdq: onnx.ModelProto) -> onnx.ModelProto:
    """The QDQ graph cut at every made tensor: readers take `<name>/given`, an input, instead of what was made."""
    local = probe_graph(qdq, made_tensors(qdq))
    shapes = {value.name: value for value in local.graph.output}
    for node in local.graph.node:
        for index, name in enumerate(node.input):
            if name in shapes:
                node.input[index] = f"{name}/given"
    for name, value in shapes.items():
        given = onnx.ValueInfoProto()
        given.CopyFrom(value)
        given.name = f"{name}/given"
        local.graph.input.append(given)
    del local.graph.value_info[:]
    return local


def op_errors(qdq: onnx.ModelProto, feed: dict[str, np.ndarray], emulated: list[np.ndarray]) -> list[dict[str, Any]]:
    """The error of every op, largest first.

    Args:
        qdq: the graph.
        feed: the graph's inputs.
        emulated: what the emulator returned for a probe of all `made_tensors` on `feed`.

    Returns:
        One record a tensor: `tensor`, `op`, `bits`, `error` (root mean square over the range's width).
    """
    tensors = made_tensors(qdq)
    given = {f"{tensor.name}/given": value for tensor, value in zip(tensors, emulated, strict=True)}
    session = exact_session(local_graph(qdq))
    wanted = {item.name for item in session.get_inputs()}
    exact = session.run(None, {name: value for name, value in (feed | given).items() if name in wanted})
    records = []
    for tensor, value, expected in zip(tensors, emulated, exact, strict=True):
        error = float(np.sqrt(np.mean(np.square(value.astype(np.float64) - expected)))) / tensor.width
        records.append({"tensor": tensor.name, "op": tensor.op_type, "bits": tensor.bits, "error": error})
    return sorted(records, key=lambda record: -record["error"])


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """For the certificate: the threshold, the worst op, and the largest error by op type and bits."""
    by_op: dict[str, float] = {}
    for record in records:  # largest first
        by_op.setdefault(f"{record['op']} u{record['bits']}", round(record["error"], 7))
    return {
        "ops": len(records),
        "error": "root mean square / width of the output's range",
        "threshold": round(MAX_OP_ERROR, 7),
        "largest": records[0] | {"error": round(records[0]["error"], 7)},
        "largest_by_op": dict(sorted(by_op.items())),
    }


def gate_ops(records: list[dict[str, Any]]) -> None:
    """Refuse an op that the HTP computes wrongly.

    Raises:
        ExportError: the largest error is over `MAX_OP_ERROR`; names the op and its tensor.
    """
    worst = records[0]
    if not worst["error"] <= MAX_OP_ERROR:
        raise ExportError(
            f"{worst['op']} at {worst['bits']} bits is silently wrong on the HTP: its output {worst['tensor']!r} is "
            f"off by {worst['error']:.4f} of its range (root mean square), at most {MAX_OP_ERROR:.4f} is allowed; "
            "write the op another way in the family's graph or in rewrite.py, or give it other bits"
        )
