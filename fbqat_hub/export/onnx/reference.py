"""ONNX Runtime on the CPU, told to be exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime


def exact_session(model: onnx.ModelProto | str) -> onnxruntime.InferenceSession:
    """A CPU session that computes a QDQ graph literally: quantize, dequantize, then the op in float32.

    By default ONNX Runtime fuses DQ -> op -> Q into integer kernels, whose u8 x s8 products saturate at 16 bits on
    AVX2 without VNNI: the reference itself would be wrong. All graph optimization is off, QDQ fusion is off, and
    what integer kernels remain are told to take the exact path.

    Nodes run in the order in which the graph lists them, so what is read next to where it is made is soon freed. In
    the default order, which starts from the outputs, every tensor that an output is computed from would wait.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False  # it grows by doubling and gives nothing back
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_all(session: onnxruntime.InferenceSession, feeds: Sequence[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The first output of `session` for each of `feeds`."""
    return [session.run(None, feed)[0] for feed in feeds]
