"""Ranges for 8 bits cut off lone outliers, keep what is spread out, and reach the tensors that have 8 bits."""

from __future__ import annotations

import numpy as np

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export.onnx.calibration import Ranges, calibrate
from fbqat_hub.export.onnx.clipping import clipped_ranges, least_error_range, tensors_at_8_bits
from fbqat_hub.export.onnx.float_graph import FloatGraph
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.export.onnx.qdq import insert_qdq
from fbqat_hub.export.onnx.reference import exact_session
from tests.export.graphs import one_op


def test_what_is_spread_out_keeps_its_range() -> None:
    assert least_error_range(np.ones(2048), -1.0, 3.0) == (-1.0, 3.0)


def test_each_end_is_cut_by_itself() -> None:
    """A Gaussian of standard deviation 0.1 cut at 0.5, and one of a hundred million values at -4."""
    values = np.random.default_rng(0).normal(scale=0.1, size=100_000).clip(-0.5, 0.5)
    histogram = 1000 * np.histogram(values, 2048, (-4.0, 0.5))[0]
    histogram[0] = 1
    low, high = least_error_range(histogram, -4.0, 0.5)
    assert -0.8 < low < -0.3
    assert 0.3 < high <= 0.5


def test_a_lone_outlier_in_front_of_a_layer_costs_less() -> None:
    """One of two million values is 20 times their standard deviation; inputs without it gain two bits' worth."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(16, 512)).astype(np.float32)
    model = one_op("Gemm", {"x": [512, 512]}, {"weight": weight}, transB=1)
    graph, precision = FloatGraph(model, {}, {"weight": "layer"}), Precision(a16_ops=())
    feeds = [{"x": rng.normal(size=(512, 512)).astype(np.float32)} for _ in range(9)]
    feeds[0]["x"][0, 0] = 20
    ranges = calibrate(model, feeds[:8])
    names = tensors_at_8_bits(graph, precision)
    clipped = clipped_ranges(model, feeds[:8], ranges, names)
    assert names == ["x", "y"]
    expected = exact_session(model).run(None, feeds[8])

    def reached(used: Ranges | None) -> float:
        return sqnr_db(expected, exact_session(insert_qdq(graph, ranges, precision, clipped=used)).run(None, feeds[8]))

    assert reached(clipped) > reached(None) + 3


def test_factors_of_a_product_keep_their_range() -> None:
    model = one_op("MatMul", {"a": [4, 4], "b": [4, 4]})
    assert tensors_at_8_bits(FloatGraph(model, {}, {}), Precision(a16_ops=())) == ["y"]
    assert tensors_at_8_bits(FloatGraph(model, {}, {}), Precision()) == []


def test_a_graph_of_16_bits_has_nothing_to_clip() -> None:
    """What W8A16 and W4A16 ask for."""
    model = one_op("MatMul", {"a": [4, 4], "b": [4, 4]})
    feed = {"a": np.eye(4, dtype=np.float32), "b": np.eye(4, dtype=np.float32)}
    assert clipped_ranges(model, [feed], calibrate(model, [feed]), []) == {}
