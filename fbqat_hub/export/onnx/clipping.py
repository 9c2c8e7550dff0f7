"""Ranges for 8 bits: what cuts off the tails where that loses less than the coarser step it saves.

Training computes with one range per token; a graph for the HTP has one per tensor, and 256 codes. A GLU's product has
a few outliers of dozens of standard deviations: min-max would spend the codes on them. So the range of least squared
error over the calibration data is taken, from a histogram of each tensor. The factors of a product of two activations
keep min-max: an attention's scores live on the outliers of query and key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from fbqat_hub.export.onnx.calibration import Ranges, float_tensors
from fbqat_hub.export.onnx.float_graph import FloatGraph
from fbqat_hub.export.onnx.precision import VIEW_OPS, Precision, node_bits
from fbqat_hub.export.onnx.reference import exact_session

_BINS = 2048  # 8 of them a code at the full range, and still 1 where the range is an eighth
#: Shares of the lowest and of the highest value that are tried, every one with every other.
_SHARES = np.geomspace(0.1, 1.0, 20)
_LEVELS = 255
#: Weight of a squared error by clipping: in a sum over channels errors of one sign add up, roundings average out. At 1
#: the tiny PixArt-Sigma loses 0.7 dB of its output to min-max (Sana, SD3.5 and FLUX gain 3.0, 0.6 and 1.1), at 4 none
#: of the four does (2.0, 0.6, 1.0), at 16 the gain is mostly gone.
_CLIPPING = 4.0


def tensors_at_8_bits(graph: FloatGraph, precision: Precision) -> list[str]:
    """Names of the float tensors that `precision` writes or reads in 8 bits; no factor of a MatMul."""
    constants = {item.name: item for item in graph.model.graph.initializer}
    found: dict[str, None] = {}
    for node in graph.model.graph.node:
        if node.op_type in VIEW_OPS:
            continue
        bits = node_bits(node, precision, graph.layers, graph.module_names, constants)
        found.update(dict.fromkeys(name for name, width in zip(node.input, bits.inputs, strict=True) if width == 8))
        found.update(dict.fromkeys(node.output if bits.output == 8 else ()))
    factors = {name for node in graph.model.graph.node if node.op_type == "MatMul" for name in node.input}
    known = set(float_tensors(graph.model)) - factors
    return [name for name in found if name in known]


def least_error_range(histogram: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The range whose 8-bit encoding has the least squared error over a histogram, clipping weighed by `_CLIPPING`.

    Args:
        histogram: counts [bins] over [low, high], which holds 0.

    >>> counts = np.zeros(2048)
    >>> counts[:21] = 1e6  # all but one of the values are below 0.01
    >>> counts[-1] = 1
    >>> low, high = least_error_range(counts, 0.0, 1.0)
    >>> (low, round(high, 2))
    (0.0, 0.14)
    """
    values = low + (np.arange(len(histogram)) + 0.5) * (high - low) / len(histogram)
    lows, highs = (each.reshape(-1, 1) for each in np.meshgrid(low * _SHARES, high * _SHARES))
    scales = np.maximum(highs - lows, 1e-6) / _LEVELS
    zero_points = np.round(-lows / scales)
    codes = np.clip(np.round(values / scales) + zero_points, 0, _LEVELS)
    weights = np.where((values < lows) | (values > highs), _CLIPPING, 1.0)
    errors = (weights * np.square(scales * (codes - zero_points) - values) * histogram).sum(axis=1)
    best = int(errors.argmin())
    return float(lows[best, 0]), float(highs[best, 0])


def clipped_ranges(
    model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]], ranges: Ranges, names: Sequence[str]
) -> Ranges:
    """`least_error_range` of each tensor in `names` over `feeds`.

    Args:
        model: the float graph, with values for its weights (`float_graph.runnable`).
        ranges: of these tensors, as `calibrate` found them on the same feeds.
    """
    if not names:
        return {}
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = exact_session(observed)
    histograms = np.zeros((len(names), _BINS), np.int64)
    for feed in feeds:
        for histogram, name, values in zip(histograms, names, session.run(None, feed), strict=True):
            histogram += np.histogram(values, _BINS, _not_empty(*ranges[name]))[0]
    return {
        name: least_error_range(histogram, *_not_empty(*ranges[name]))
        for name, histogram in zip(names, histograms, strict=True)
    }


def _not_empty(low: float, high: float) -> tuple[float, float]:
    return low, max(high, low + 1e-6)
