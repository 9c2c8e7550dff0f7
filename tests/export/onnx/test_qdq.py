"""The QDQ graph: our codes, one encoding a tensor, and the details the HTP asks for."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export import ExportError
from fbqat_hub.export.htp.audit import audit_qdq
from fbqat_hub.export.onnx.calibration import calibrate
from fbqat_hub.export.onnx.encoding import Encoding, encoding_for_range
from fbqat_hub.export.onnx.float_graph import FloatGraph, as_feed, packed_layers, runnable, trace
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.export.onnx.qdq import insert_qdq
from fbqat_hub.export.onnx.reference import exact_session
from fbqat_hub.export.onnx.rewrite import rewrite
from fbqat_hub.families import get_family
from fbqat_hub.families.graph import GraphWrapper
from tests.export.conftest import Item, float_sana, make_items, pack
from tests.export.graphs import one_op, quantized


def qdq_of(model: nn.Module, items: list[Item], precision: Precision | None = None) -> onnx.ModelProto:
    wrapper = get_family("sana").graph(model, items[0])
    graph = trace(wrapper, items[0], packed_layers(model))
    rewrite(graph.model)
    ranges = calibrate(runnable(graph), [as_feed(wrapper.host_inputs(item)) for item in items])
    return insert_qdq(graph, ranges, precision)


@pytest.fixture(scope="module")
def qdq(packed_sana: nn.Module, calibration: list[Item]) -> onnx.ModelProto:
    """At the bits that an export gives a Sana."""
    return qdq_of(packed_sana, calibration, Precision(a16_layers=get_family("sana").a16_layers))


def read(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))


def node_of(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if output in node.output)


def test_calibration_keeps_no_tensor_longer_than_needed() -> None:
    """64 tensors of 4 MiB made one from the other: 256 MiB if each waited for its minimum and maximum until the end."""
    code = """
import numpy as np, onnx
from onnx import TensorProto, helper
from fbqat_hub.export.onnx.calibration import calibrate
from fbqat_hub.evaluation.results import peak_rss_mib
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2**20])
nodes = [helper.make_node("Relu", [f"x{index}"], [f"x{index + 1}"]) for index in range(64)]
model = helper.make_model(helper.make_graph(nodes, "chain", [value("x0")], [value("x64")]),
                          opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
feed = {"x0": np.ones((1, 2**20), np.float32)}
before = peak_rss_mib()
assert calibrate(model, [feed])["x64"] == (0.0, 1.0)
print(peak_rss_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100, done.stdout


def test_weights_are_the_packed_codes_and_scales(qdq: onnx.ModelProto, packed_sana: nn.Module) -> None:
    """Decoded by onnx's own reader of INT4, not by ours."""
    layers = packed_layers(packed_sana)
    assert len(layers) == 17
    for name, layer in layers.items():
        codes = read(qdq, f"twin.{name}.weight/codes")
        assert str(codes.dtype) == "int4"
        expected = layer.codes().numpy()
        np.testing.assert_array_equal(codes.astype(np.int8).reshape(expected.shape), expected)
        np.testing.assert_array_equal(read(qdq, f"twin.{name}.weight/scale"), layer.weight_scale.numpy())


def test_layers_read_their_input_in_the_trained_encoding(qdq: onnx.ModelProto, packed_sana: nn.Module) -> None:
    layer = packed_layers(packed_sana)["transformer_blocks.0.ff.conv_point"]
    conv = next(node for node in qdq.graph.node if node.op_type == "Conv" and "conv_point" in node.input[1])
    dequantize = node_of(qdq, conv.input[0])
    assert read(qdq, dequantize.input[1]) == layer.input_scale.numpy()
    assert read(qdq, dequantize.input[2]) == layer.input_zero_point.numpy()
    assert read(qdq, dequantize.input[2]).dtype == np.uint8


def test_bias_counts_in_input_scale_times_weight_scale(qdq: onnx.ModelProto, packed_sana: nn.Module) -> None:
    name = "transformer_blocks.0.attn1.to_out.0"
    layer = packed_layers(packed_sana)[name]
    gemm = next(node for node in qdq.graph.node if node.op_type == "Gemm" and f"{name}.weight" in node.input[1])
    codes, scale, _ = (read(qdq, item) for item in node_of(qdq, gemm.input[2]).input)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(scale, layer.input_scale.numpy() * layer.weight_scale.numpy())
    np.testing.assert_allclose(codes * scale.astype(np.float64), layer.bias.numpy(), atol=float(scale.max()) / 2)


def test_softmax_sigmoid_and_gamma(qdq: onnx.ModelProto) -> None:
    """Softmax and Sigmoid have the scale 1/2^bits and the zero point 0; a norm's gamma is uint8, never int4."""
    quantize = {node.input[0]: node for node in qdq.graph.node if node.op_type == "QuantizeLinear"}
    seen = set()
    for node in qdq.graph.node:
        if node.op_type in ("Softmax", "Sigmoid"):
            _, scale, zero_point = quantize[node.output[0]].input
            assert read(qdq, scale) == np.float32(2.0**-16)
            assert read(qdq, zero_point) == 0
        elif node.op_type in ("LayerNormalization", "RMSNormalization"):
            assert read(qdq, node_of(qdq, node.input[1]).input[0]).dtype == np.uint8
        seen.add(node.op_type)
    assert {"Softmax", "Sigmoid", "LayerNormalization", "RMSNormalization"} <= seen


def test_the_last_layer_the_timestep_and_depthwise_compute_at_16_bits(qdq: onnx.ModelProto) -> None:
    for node in qdq.graph.node:
        if node.op_type in ("Gemm", "Conv"):
            bits = 8 * read(qdq, node_of(qdq, node.input[0]).input[2]).itemsize
            wide = any(part in node.input[1] for part in ("proj_out", "time_embed", "conv_depth"))
            assert bits == (16 if wide else 8), node.input[1]


def test_view_ops_keep_one_encoding(qdq: onnx.ModelProto) -> None:
    quantize = {node.input[0]: node for node in qdq.graph.node if node.op_type == "QuantizeLinear"}
    views = [node for node in qdq.graph.node if node.op_type in ("Reshape", "Transpose", "Split")]
    assert views
    for node in views:
        source = node_of(qdq, node.input[0])
        for output in node.output:
            target = quantize[output]
            for place in (1, 2):
                assert read(qdq, source.input[place]) == read(qdq, target.input[place])


def test_relu_is_the_clip_of_the_codes_before_it(qdq: onnx.ModelProto) -> None:
    """A tensor that only feeds a ReLU is quantized over [0, max]: zero point 0, twice the resolution."""
    relus = [node for node in qdq.graph.node if node.op_type == "Relu"]
    assert len(relus) == 2
    for node in relus:
        assert read(qdq, node_of(qdq, node.input[0]).input[2]) == 0


def test_what_a_split_gives_to_others_than_a_relu_keeps_its_sign() -> None:
    """Queries, keys and values cut from one tensor, of which values pass no ReLU: the decoder of AutoencoderDC."""

    class Fused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, value = (x + x).chunk(2, dim=-1)
            return torch.relu(query) + value

    x = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    graph = trace(GraphWrapper(Fused(), lambda item: dict(item)), {"x": x}, {})
    feed = {"x": x.numpy()}
    output = exact_session(quantized(graph.model, [feed])).run(None, feed)[0]
    assert sqnr_db(Fused()(x).numpy(), output) > 60


def test_widening_is_exact() -> None:
    encoding = encoding_for_range(-1.3, 2.9, 8)
    wide = encoding.widened()
    codes = np.arange(256)
    narrow = np.float32(encoding.scale) * (codes - encoding.zero_point).astype(np.float32)
    np.testing.assert_array_equal(np.float32(wide.scale) * (256 * codes - wide.zero_point).astype(np.float32), narrow)


def test_a_divisor_that_rounds_to_zero_divides_nothing_by_zero() -> None:
    """ReLU linear attention divides by sum(k) q, which is 0 for a dead head: torch gives 0 / 1e-15 = 0."""
    model = one_op("Max", {"b": [4]}, {"floor": np.array(1e-15, np.float32)})
    model.graph.node[0].output[0] = "positive"
    model.graph.node.append(helper.make_node("Div", ["a", "positive"], ["y"]))
    model.graph.input.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [4]))
    feeds = [{"a": np.array([0, 1, 2, 0], np.float32), "b": np.array([0, 1e4, 2e4, 1e-3], np.float32)}]
    output = exact_session(quantized(model, feeds)).run(None, feeds[0])[0]
    np.testing.assert_allclose(output, [0, 1e-4, 1e-4, 0], atol=1e-5)


def test_a_dead_head_of_linear_attention_stays_silent(held_out: list[Item]) -> None:
    model = pack(float_sana())
    model.get_submodule("transformer_blocks.0.attn1.to_k").weight_packed.data[:32] = 0  # head 0: 0 / 0
    wrapper = get_family("sana").graph(model, held_out[0])
    session = exact_session(qdq_of(model, make_items(8, seed=1)))
    for item in held_out:
        output = session.run(None, as_feed(wrapper.host_inputs(item)))[0]
        with torch.no_grad():
            assert sqnr_db([model(**item, return_dict=False)[0].numpy()], [output]) > 30


def test_a_bias_beyond_int32_names_the_row() -> None:
    model = pack(float_sana())
    layer = model.get_submodule("proj_out")
    layer.weight_scale[3] = 1e-12
    layer.bias.data[3] = 10
    with pytest.raises(ExportError, match=r"'twin.proj_out.bias' row 3 .* int32"):
        qdq_of(model, make_items(2, seed=1))


def test_calibration_names_the_tensor_that_is_not_finite() -> None:
    model = one_op("Log", {"x": [2]})
    with pytest.raises(ExportError, match="'y' is not finite"):
        calibrate(model, [{"x": np.array([1.0, -1.0], np.float32)}])


def test_the_reference_does_not_saturate() -> None:
    """u8 x s8 products summed in pairs overflow 16 bits on AVX2: 2 * 255 * 127 = 64770 > 32767."""
    model = one_op("Gemm", {"x": [1, 8]}, {"weight": np.full((4, 8), 1.0, np.float32)}, transB=1)
    graph = FloatGraph(model, {}, {"weight": "layer"})
    feed = {"x": np.full((1, 8), 255.0, np.float32)}
    qdq = insert_qdq(graph, calibrate(model, [feed]), Precision(a16_ops=()))
    np.testing.assert_allclose(exact_session(qdq).run(None, feed)[0], np.full((1, 4), 2040.0), rtol=1e-6)


class TestAudit:
    def test_passes(self, qdq: onnx.ModelProto, packed_sana: nn.Module) -> None:
        audited = audit_qdq(qdq, packed_layers(packed_sana))
        assert audited["packed_weights_bit_equal"] == audited["static_input_encodings_bit_equal"] == 17
        assert audited["weights_by_type"] == {"int4": 17, "int8": 1}  # the depthwise convolution is W8

    @pytest.mark.parametrize(
        ("part", "message"), [("codes", "codes of 'proj_out' differ"), ("scale", "scales of 'proj_out' differ")]
    )
    def test_one_flipped_bit_fails(self, qdq: onnx.ModelProto, packed_sana: nn.Module, part: str, message: str) -> None:
        broken = onnx.ModelProto()
        broken.CopyFrom(qdq)
        tensor = next(item for item in broken.graph.initializer if item.name == f"twin.proj_out.weight/{part}")
        raw = bytearray(tensor.raw_data)
        raw[5] ^= 1
        tensor.raw_data = bytes(raw)
        with pytest.raises(ExportError, match=message):
            audit_qdq(broken, packed_layers(packed_sana))

    def test_another_input_scale_fails(self, qdq: onnx.ModelProto, packed_sana: nn.Module) -> None:
        model = pack(float_sana())
        model.get_submodule("proj_out").input_scale *= 1.01
        with pytest.raises(ExportError, match="input of 'proj_out'"):
            audit_qdq(qdq, packed_layers(model))

    def test_a_float_tensor_fails(self, qdq: onnx.ModelProto, packed_sana: nn.Module) -> None:
        broken = onnx.ModelProto()
        broken.CopyFrom(qdq)
        node = next(node for node in broken.graph.node if node.op_type == "Softmax")
        node.input[0] = next(node.output[0] for node in broken.graph.node if node.op_type == "Add")
        with pytest.raises(ExportError, match=r"is not quantized|reads float tensor"):
            audit_qdq(broken, packed_layers(packed_sana))


def test_encoding_holds_zero_exactly() -> None:
    assert encoding_for_range(0.5, 2.0, 8) == encoding_for_range(0.0, 2.0, 8)
    assert encoding_for_range(0.0, 0.0, 8) == Encoding(float(np.float32(1e-6 / 255)), 0, 8)
