"""What the HTP refuses, runs in float or computes wrongly, on graphs of one op: without the cure and with it.

Each of these is a row of the table in docs/htp.md. That it still is wrong without its cure is asserted too: the day a
compiler computes it, the cure can go.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export import ExportError, Precision
from fbqat_hub.export.bundle.text_encoder import ENCODER_MASK_BIAS
from fbqat_hub.export.htp import op_parity
from fbqat_hub.export.onnx import rewrite
from fbqat_hub.export.onnx.reference import exact_session
from fbqat_hub.families.graph import MASK_BIAS
from tests.export.graphs import Feed, compiled, emulated_db, emulated_op_errors, norm_and_bias, one_op, quantized

pytest.importorskip("onnxruntime_qnn")
AT_8_BITS = Precision(a16_ops=())


def normal(*shape: int, scale: float = 1.0) -> list[Feed]:
    return [{"x": scale * np.random.default_rng(0).normal(size=shape).astype(np.float32)}]


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def test_instance_norm_runs_in_float_and_is_refused(tmp_path: Path) -> None:
    model = one_op("InstanceNormalization", {"x": [1, 4, 8, 8]}, {"scale": ones(4), "bias": 0 * ones(4)})
    with pytest.raises(ExportError, match="is float32 inside the compiled graph"):
        compiled(model, normal(1, 4, 8, 8), tmp_path)
    with pytest.raises(ExportError, match=r"InstanceNormalization .*runs in float"):
        rewrite.rewrite(model)


def test_group_norm_does_not_compile_and_layer_norm_does(tmp_path: Path) -> None:
    constants = {"scale": 2 * ones(4), "bias": 0.1 * ones(4)}
    model = one_op("GroupNormalization", {"x": [1, 4, 8, 8]}, constants, num_groups=2)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8]))
    feeds = normal(1, 4, 8, 8)
    (tmp_path / "before").mkdir()
    with pytest.raises(ExportError, match="HTP compile failed"):
        compiled(model, feeds, tmp_path / "before")
    assert rewrite.rewrite(model)["group_norm_to_layer_norm"] == 1
    assert compiled(model, feeds, tmp_path)["float32"] == 2  # the input and the output
    op_parity.gate_ops(emulated_op_errors(model, feeds, tmp_path))


def test_layer_norm_with_a_bias_runs_in_float_and_a_sum_does_not(tmp_path: Path) -> None:
    model = one_op("LayerNormalization", {"x": [1, 16, 64]}, {"scale": ones(64), "bias": 0.1 * ones(64)}, axis=-1)
    feeds = normal(1, 16, 64)
    (tmp_path / "before").mkdir()
    with pytest.raises(ExportError, match="is float32 inside the compiled graph"):
        compiled(model, feeds, tmp_path / "before")
    rewrite.rewrite(model)
    assert compiled(model, feeds, tmp_path)["float32"] == 2
    op_parity.gate_ops(emulated_op_errors(model, feeds, tmp_path))


def rms_norm(*shape: int) -> onnx.ModelProto:
    return one_op("RMSNormalization", {"x": list(shape)}, {"scale": ones(shape[-1])}, axis=-1, epsilon=1e-6)


def test_a_sum_with_zeros_behind_rms_norm_in_front_of_relu_is_wrong_and_dropped(tmp_path: Path) -> None:
    """The compiler leaves the sum out, and with it the encoding from 0 on that ReLU's input has."""
    model = norm_and_bias(0.0, "Relu")
    feeds = normal(1, 4, 4, 8)
    with pytest.raises(ExportError, match="Add at 16 bits is silently wrong"):
        op_parity.gate_ops(emulated_op_errors(model, feeds, tmp_path))
    rewrite.rewrite(model)
    op_parity.gate_ops(emulated_op_errors(model, feeds, tmp_path))


def test_rms_norm_of_heads_of_32_is_wrong_at_8_bits_and_right_at_16(tmp_path: Path) -> None:
    """Only with more than one outer dimension; the op gate sees it where `auto` or a person asks for 8 bits."""
    feeds = normal(1, 4, 16, 32)
    with pytest.raises(ExportError, match="RMSNormalization at 8 bits is silently wrong"):
        op_parity.gate_ops(emulated_op_errors(rms_norm(1, 4, 16, 32), feeds, tmp_path, AT_8_BITS))
    op_parity.gate_ops(emulated_op_errors(rms_norm(1, 4, 16, 32), feeds, tmp_path))
    op_parity.gate_ops(emulated_op_errors(rms_norm(1, 16, 64), normal(1, 16, 64), tmp_path, AT_8_BITS))


def silu_and_conv(channels: int, rows: int) -> onnx.ModelProto:
    """SiLU of [1, channels, rows, 8], then a 1x1 convolution to 8 channels."""
    weight = np.random.default_rng(1).normal(size=(8, channels, 1, 1)) / channels**0.5
    model = one_op("Sigmoid", {"x": [1, channels, rows, 8]})
    nodes, constants = model.graph.node, model.graph.initializer
    nodes[0].output[0] = "gate"
    nodes.append(helper.make_node("Mul", ["x", "gate"], ["silu"]))
    nodes.append(helper.make_node("Conv", ["silu", "conv.weight", "conv.bias"], ["y"], name="conv"))
    constants.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "conv.weight"))
    constants.append(onnx.numpy_helper.from_array(np.zeros(8, np.float32), "conv.bias"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, rows, 8]))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(
    ("channels", "rows", "wrong"), [(256, 8, True), (128, 8, False), (256, 4, False), (256, 16, False)]
)
def test_silu_of_8_rows_is_wrong_and_of_1_row_is_right(channels: int, rows: int, wrong: bool, tmp_path: Path) -> None:
    """8 rows of 8 pixels are wrong from 256 channels on; the convolution alone, and SiLU alone, are right."""
    model, feeds = silu_and_conv(channels, rows), normal(1, channels, rows, 8)
    assert (emulated_db(model, feeds, tmp_path) < 10) == wrong
    assert rewrite.rewrite(model)["silu_of_8_rows_to_1_row"] == (rows == 8)
    assert emulated_db(model, feeds, tmp_path) > 60


def test_tanh_of_small_values_needs_the_encoding_of_the_whole_range(tmp_path: Path) -> None:
    """Off by a fiftieth of its range at 16 bits if that is the range of what was seen, +-0.001."""
    errors = emulated_op_errors(one_op("Tanh", {"x": [1, 64]}), normal(1, 64, scale=0.0005), tmp_path)
    assert errors[0]["error"] < 1e-3


@pytest.mark.parametrize("bias", [MASK_BIAS, ENCODER_MASK_BIAS])
def test_a_mask_leaves_the_scores_their_resolution(bias: float) -> None:
    """Scores and mask share one range: diffusers' -10000 leaves a step of 0.15 at 16 bits."""

    def reached(masked: float) -> float:
        model = one_op("Softmax", {"x": [1, 64]}, axis=-1)
        feeds = normal(1, 64)
        feeds[0]["x"][:, 48:] += masked
        expected = exact_session(model).run(None, feeds[0])
        return sqnr_db(expected, exact_session(quantized(model, feeds)).run(None, feeds[0]))

    assert reached(bias) > 50
    assert reached(-10000) < 30
