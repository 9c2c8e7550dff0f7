"""Small ONNX graphs, and their way to the emulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export.htp import audit, compiler, op_parity
from fbqat_hub.export.htp.targets import target_for
from fbqat_hub.export.onnx.calibration import calibrate
from fbqat_hub.export.onnx.float_graph import OPSET, FloatGraph
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.export.onnx.qdq import insert_qdq
from fbqat_hub.export.onnx.reference import exact_session

Feed = dict[str, np.ndarray]


def one_op(op: str, shapes: dict[str, list[int]], constants: dict[str, np.ndarray] | None = None, **attributes: Any):
    """A graph of one op from the float inputs of `shapes` (and `constants`) to `y`."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    node = helper.make_node(op, [*shapes, *(constants or {})], ["y"], name="op", **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output], held), opset_imports=[helper.make_opsetid("", OPSET)]
    )
    model.ir_version = 10
    return onnx.shape_inference.infer_shapes(model)


def norm_and_bias(bias: float, after: str) -> onnx.ModelProto:
    """RMSNormalization over 8 channels, then a bias, then the op `after`."""
    constants = {"weight": np.ones(8, np.float32)}
    model = one_op("RMSNormalization", {"x": [1, 4, 4, 8]}, constants, axis=-1, epsilon=1e-5)
    model.graph.node[0].output[0] = "normed"
    model.graph.node.append(helper.make_node("Add", ["normed", "bias"], ["biased"]))
    model.graph.node.append(helper.make_node(after, ["biased"], ["y"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(8, bias, np.float32), "bias"))
    return onnx.shape_inference.infer_shapes(model)


def quantized(model: onnx.ModelProto, feeds: list[Feed], precision: Precision | None = None) -> onnx.ModelProto:
    """`model` calibrated on `feeds`, as QDQ."""
    return insert_qdq(FloatGraph(model, {}, {}), calibrate(model, feeds), precision)


def emulated_op_errors(model: onnx.ModelProto, feeds: list[Feed], folder: Path, precision: Precision | None = None):
    """The op errors of `model` on the emulator, for the first feed."""
    qdq = quantized(model, feeds, precision)
    onnx.save(op_parity.probe_graph(qdq, op_parity.made_tensors(qdq)), folder / "probe.onnx")
    outputs = compiler.run_probe(folder / "probe.onnx", feeds[:1], target_for("sm8750"))
    return op_parity.op_errors(qdq, feeds[0], outputs[0])


def emulated_db(model: onnx.ModelProto, feeds: list[Feed], folder: Path) -> float:
    """SQNR of `model` at 16 activation bits on the emulator, to the exact CPU, for the first feed."""
    module_names = {item.name: item.name.removesuffix(".weight") for item in model.graph.initializer}
    qdq = insert_qdq(FloatGraph(model, {}, module_names), calibrate(model, feeds))
    onnx.save(qdq, folder / "graph.onnx")
    outputs = compiler.run_probe(folder / "graph.onnx", feeds[:1], target_for("sm8750"))
    return sqnr_db(exact_session(qdq).run(None, feeds[0]), outputs[0])


def compiled(model: onnx.ModelProto, feeds: list[Feed], folder: Path) -> dict[str, int]:
    """Tensors by data type of `model` compiled at 16 activation bits, audited."""
    onnx.save(quantized(model, feeds), folder / "graph.onnx")
    compiler.compile_context(folder / "graph.onnx", folder / "context.onnx", target_for("sm8750"), folder)
    counts: dict[str, int] = audit.audit_compiled(folder / "qnn_graph", {})["tensors_by_type"]
    return counts
