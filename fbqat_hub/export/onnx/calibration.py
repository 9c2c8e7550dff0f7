"""Ranges of every float tensor of an ONNX graph, from running data through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.reference import exact_session

#: (lowest, highest) value seen, in the tensor's own unit. 0 is always inside: padding and ReLU must be exact.
Ranges = dict[str, tuple[float, float]]


def float_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of the graph's float32 inputs and node outputs, in order; no weights, stored in float or as codes."""
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]}
    made = (name for node in graph.node if node.op_type != "DequantizeLinear" for name in node.output if name)
    names = [*(value.name for value in graph.input), *made]
    return [name for name in dict.fromkeys(names) if kinds.get(name, TensorProto.FLOAT) == TensorProto.FLOAT]


def _observed(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """`model` with minimum, maximum and sum of each of `names` as its outputs, made right behind the tensor."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.node[:], observed.graph.output[:]
    observers = {
        name: [
            helper.make_node(op, [name], [f"{name}/{op}"], keepdims=0)
            for op in ("ReduceMin", "ReduceMax", "ReduceSum")  # minimum and maximum may skip NaN, a sum does not
        ]
        for name in names
    }
    for value in model.graph.input:
        observed.graph.node.extend(observers[value.name])
    for node in model.graph.node:
        observed.graph.node.append(node)
        for name in node.output:
            observed.graph.node.extend(observers.get(name, []))
    observed.graph.output.extend(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [])
        for name in names
        for node in observers[name]
    )
    return observed


def calibrate(
    model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]], on_step: Callable[[int, int], None] | None = None
) -> Ranges:
    """Minimum and maximum of every float tensor over `feeds` (min-max observer, run inside ONNX Runtime).

    Args:
        feeds: graph inputs by name, float32; at least one.
        on_step: called with (done, total) after each feed.

    Raises:
        ExportError: no feeds, or a tensor that is not finite (named).
    """
    if not feeds:
        raise ExportError("calibration needs at least one item, got none")
    names = float_tensors(model)
    session = exact_session(_observed(model, names))
    lows, highs = np.zeros(len(names)), np.zeros(len(names))
    for step, feed in enumerate(feeds):
        values = np.array([float(value) for value in session.run(None, feed)])
        if not np.isfinite(values).all():
            name = names[int(np.flatnonzero(~np.isfinite(values))[0]) // 3]
            raise ExportError(f"calibration item {step}: tensor {name!r} is not finite; are the inputs and weights?")
        lows, highs = np.minimum(lows, values[0::3]), np.maximum(highs, values[1::3])
        if on_step:
            on_step(step + 1, len(feeds))
    return {name: (float(low), float(high)) for name, low, high in zip(names, lows, highs, strict=True)}
