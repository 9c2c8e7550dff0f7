"""What a QDQ graph takes, makes and asks of a device, counted and not timed: no latency can be measured without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from fbqat_hub.export.onnx.precision import VIEW_OPS
from fbqat_hub.export.onnx.rewrite import static_shapes

#: What a QuantizeLinear may stand behind that writes no new activation: graph inputs, conversions (counted where the
#: tensor was made) and views.
_WRITES_NOTHING = VIEW_OPS | {"QuantizeLinear", "DequantizeLinear"}


def describe_tensors(model: onnx.ModelProto) -> dict[str, list[dict[str, Any]]]:
    """The graph's inputs and outputs: float32 at the boundary, quantized right behind it with scale and offset.

    `offset` is QNN's own sign: real = scale * (q + offset), so offset = -zero_point.
    """
    graph = model.graph
    constants = {item.name: item for item in graph.initializer}

    def describe(value: onnx.ValueInfoProto, quantize: onnx.NodeProto) -> dict[str, Any]:
        zero_point = numpy_helper.to_array(constants[quantize.input[2]])
        return {
            "name": value.name,
            "shape": [dimension.dim_value for dimension in value.type.tensor_type.shape.dim],
            "dtype": onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            "quantized_dtype": str(zero_point.dtype),
            "scale": float(numpy_helper.to_array(constants[quantize.input[1]])),
            "offset": -int(zero_point),
        }

    reads = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    makes = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        "inputs": [describe(value, reads[value.name]) for value in graph.input],
        "outputs": [describe(value, makes[value.name]) for value in graph.output],
    }


def cost(qdq: onnx.ModelProto) -> dict[str, int]:
    """What the graph asks of a device.

    Returns:
        `macs` (multiply-accumulates of Gemm, Conv and MatMul), `macs_a16` (those that read 16-bit activations),
        `constant_bytes` (weights, biases, scales, tables as stored in the QDQ file), `activation_bytes` (what all ops
        but views write), `io_bytes` (quantized inputs and outputs).
    """
    inferred = onnx.shape_inference.infer_shapes(qdq)
    shapes = static_shapes(inferred)
    constants = {item.name: item for item in qdq.graph.initializer}
    producer = {name: node for node in qdq.graph.node for name in node.output}
    macs = wide = written = 0
    for node in qdq.graph.node:
        if node.op_type == "QuantizeLinear" and producer.get(node.input[0], node).op_type not in _WRITES_NOTHING:
            zero_point = constants[node.input[2]]
            written += int(np.prod(shapes[node.output[0]])) * numpy_helper.to_array(zero_point).itemsize
        if node.op_type not in ("Gemm", "Conv", "MatMul"):
            continue
        made, second = int(np.prod(shapes[node.output[0]])), shapes[node.input[1]]
        # the inner dimension: rows of the second matrix; of a transposed Gemm and a Conv everything but the outputs
        inner = second[-2] if node.op_type == "MatMul" else int(np.prod(second[1:]))
        macs += made * inner
        zero_point = constants[producer[node.input[0]].input[2]]
        wide += made * inner if zero_point.data_type == onnx.TensorProto.UINT16 else 0
    boundary = describe_tensors(qdq)
    return {
        "macs": macs,
        "macs_a16": wide,
        "constant_bytes": sum(len(item.raw_data) or numpy_helper.to_array(item).nbytes for item in constants.values()),
        "activation_bytes": written,
        "io_bytes": sum(
            int(np.prod(tensor["shape"])) * np.dtype(tensor["quantized_dtype"]).itemsize
            for tensor in [*boundary["inputs"], *boundary["outputs"]]
        ),
    }
