"""The figures of cost, by hand."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from fbqat_hub.export.htp.cost import cost, describe_tensors
from fbqat_hub.export.onnx.calibration import calibrate
from fbqat_hub.export.onnx.float_graph import FloatGraph
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.export.onnx.qdq import insert_qdq
from tests.export.graphs import one_op


def layer_and_product() -> onnx.ModelProto:
    """[2, 3] x weight [4, 3] + bias -> [2, 4], times its own [2, 4]'s view [4, 2] -> [2, 2]."""
    constants = {"weight": np.ones((4, 3), np.float32), "bias": np.ones(4, np.float32)}
    model = one_op("Gemm", {"x": [2, 3]}, constants, transB=1)
    model.graph.node[0].output[0] = "layer"
    model.graph.node.append(helper.make_node("Transpose", ["layer"], ["turned"], perm=[1, 0]))
    model.graph.node.append(helper.make_node("MatMul", ["layer", "turned"], ["y"]))
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2]))
    return onnx.shape_inference.infer_shapes(model)


def quantized(precision: Precision) -> onnx.ModelProto:
    model = layer_and_product()
    ranges = calibrate(model, [{"x": np.array([[-1, 0, 3], [1, 1, 1]], np.float32)}])
    return insert_qdq(FloatGraph(model, {}, {"weight": "layer"}), ranges, precision)


def test_operations_and_bytes() -> None:
    """Gemm 2 x 4 x 3 = 24 and MatMul 2 x 2 x 4 = 16 multiply-accumulates; x is 2 x 3, the layer 2 x 4, y 2 x 2."""
    wide, narrow = cost(quantized(Precision())), cost(quantized(Precision(a16_ops=())))
    assert (wide["macs"], wide["macs_a16"]) == (40, 40)
    assert (narrow["macs"], narrow["macs_a16"]) == (40, 0)
    assert (wide["activation_bytes"], narrow["activation_bytes"]) == (2 * (8 + 4), 8 + 4)
    # the graph's input is at 16 bits in both
    assert (wide["io_bytes"], narrow["io_bytes"]) == (2 * (6 + 4), 2 * 6 + 4)
    # 12 weights of 8 bits and 4 int32 biases; scale and zero point of each: 4 x (4 + 1), 4 x (4 + 4). The other bytes
    # are scales and zero points of activations: x, the layer, its second operand at 8 bits, y.
    assert wide["constant_bytes"] - (12 + 16 + 20 + 32) in range(4 * 5, 8 * 6 + 1)


def test_the_boundary_is_described_by_what_quantizes_it() -> None:
    """QNN's offset is the negative zero point: [-1, 3] in 65536 steps has zero point 16384."""
    described = describe_tensors(quantized(Precision()))
    [entry] = described["inputs"]
    assert entry == {
        "name": "x",
        "shape": [2, 3],
        "dtype": "float",
        "quantized_dtype": "uint16",
        "scale": float(np.float32(4 / 65535)),
        "offset": -16384,
    }
    assert [tensor["name"] for tensor in described["outputs"]] == ["y"]
