"""The compiler and the emulator on graphs of one op: the silent wrong results, and that the checks see them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fbqat_hub.export import ExportError, Precision
from fbqat_hub.export.htp import audit, compiler, op_parity
from fbqat_hub.export.htp.targets import target_for
from fbqat_hub.export.onnx import rewrite
from tests.export.graphs import emulated_op_errors, one_op, quantized

pytest.importorskip("onnxruntime_qnn")
TARGET = target_for("sm8750")


def small_values() -> list[dict[str, np.ndarray]]:
    return [{"x": np.linspace(0.05, 0.4, 64, dtype=np.float32).reshape(1, 64)}]


def test_reciprocal_is_silently_wrong_and_division_is_right(tmp_path: Path) -> None:
    """The cure of `rewrite.reciprocal_to_div`, and proof that the op gate would catch its absence."""
    model = one_op("Reciprocal", {"x": [1, 64]})
    with pytest.raises(ExportError, match="Reciprocal at 8 bits is silently wrong"):
        op_parity.gate_ops(emulated_op_errors(model, small_values(), tmp_path, Precision(a16_ops=())))
    rewrite.rewrite(model)
    op_parity.gate_ops(emulated_op_errors(model, small_values(), tmp_path, Precision(a16_ops=())))


def test_mixed_matmul_keeps_one_side_at_8_bits(tmp_path: Path) -> None:
    """A16 x A8, the default: within a fifth of an 8-bit code."""
    rng = np.random.default_rng(0)
    feed = {name: rng.normal(size=(1, 5, 32, 32)).astype(np.float32) for name in ("a", "b")}
    errors = emulated_op_errors(one_op("MatMul", {name: [1, 5, 32, 32] for name in feed}), [feed], tmp_path)
    assert (errors[0]["op"], errors[0]["bits"]) == ("MatMul", 16)
    assert errors[0]["error"] < 0.2 / 255


@pytest.fixture(scope="module")
def qdq_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("htp") / "graph.onnx"
    onnx.save(quantized(one_op("Softmax", {"x": [1, 64]}), small_values()), path)
    return path


def test_the_context_says_what_it_was_built_for(qdq_file: Path, tmp_path: Path) -> None:
    context = tmp_path / "context.onnx"
    compiler.compile_context(qdq_file, context, TARGET, tmp_path)
    read = audit.audit_context(onnx.load(context), TARGET)
    assert read["qnn_sdk_build"].startswith("v2.")
    assert audit.audit_compiled(tmp_path / "qnn_graph", {})["tensors_by_type"]["float32"] == 2  # input and output
    assert audit.spill_fill_bytes(onnx.load(context)) == 0  # 64 numbers stay in VTCM
    other = dataclasses.replace(TARGET, soc_model=57, htp_arch=75)
    with pytest.raises(ExportError, match="built for"):
        audit.audit_context(onnx.load(context), other)


def test_the_context_says_how_much_the_compiler_spills(tmp_path: Path) -> None:
    """Scores [1, 4, 1024, 1024] of 16 bits, read twice, are as large as all of VTCM."""
    shape = {"a": [1, 4, 1024, 64], "b": [1, 4, 64, 1024]}
    model = one_op("MatMul", shape)
    steps = [("Softmax", ["y"], "p"), ("MatMul", ["p", "a"], "q"), ("MatMul", ["y", "q"], "z")]
    model.graph.node.extend(onnx.helper.make_node(op, inputs, [made], name=made) for op, inputs, made in steps)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, shape["a"]))
    rng = np.random.default_rng(0)
    feed = {name: rng.normal(size=sides).astype(np.float32) for name, sides in shape.items()}
    onnx.save(quantized(onnx.shape_inference.infer_shapes(model), [feed]), tmp_path / "graph.onnx")
    compiler.compile_context(tmp_path / "graph.onnx", tmp_path / "context.onnx", TARGET, tmp_path)
    assert audit.spill_fill_bytes(onnx.load(tmp_path / "context.onnx")) > TARGET.vtcm_mb * 2**20


def test_without_soc_model_another_architecture_comes_out_and_is_refused(
    qdq_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "provider_options", lambda target: {"htp_arch": str(target.htp_arch), "vtcm_mb": "8"})
    context = tmp_path / "context.onnx"
    compiler.compile_context(qdq_file, context, TARGET, tmp_path)
    with pytest.raises(ExportError, match="built for"):
        audit.audit_context(onnx.load(context), TARGET)


def test_an_unknown_soc_model_is_an_error(qdq_file: Path, tmp_path: Path) -> None:
    wrong = dataclasses.replace(TARGET, soc_model=9999)
    with pytest.raises(ExportError, match=r"(?s)HTP compile failed .*soc_model it does not know"):
        compiler.compile_context(qdq_file, tmp_path / "context.onnx", wrong, tmp_path)


def test_an_op_that_qnn_refuses_is_an_error_not_a_fallback(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(quantized(one_op("Erf", {"x": [1, 64]}), small_values()), path)
    with pytest.raises(ExportError, match="HTP compile failed"):
        compiler.compile_context(path, tmp_path / "context.onnx", TARGET, tmp_path)


def test_the_compiled_audit_sees_float_and_lost_weights(tmp_path: Path) -> None:
    def tensor(kind: int, data_type: int, encoding: int = 0, scale: float = 1.0) -> dict[str, Any]:
        quantization = {"encoding": encoding, "scale_offset": {"scale": scale, "offset": 0}}
        return {"type": kind, "data_type": data_type, "quant_params": quantization}

    four_bits = float(np.array(4, np.uint32).view(np.float32))
    weight = {"twin.a.weight/codes": tensor(4, 0x0308, 3, four_bits)}

    def write(tensors: dict[str, Any]) -> None:
        (tmp_path / "graph.json").write_text(json.dumps({"graph": {"tensors": tensors, "nodes": {}}}))

    write(weight | {"x": tensor(0, 0x0232)})
    assert audit.audit_compiled(tmp_path, {"a": 4})["tensors_by_type"] == {"float32": 1, "sfixed4": 1}
    write(weight | {"hidden": tensor(3, 0x0232)})
    with pytest.raises(ExportError, match="'hidden' is float32 inside"):
        audit.audit_compiled(tmp_path, {"a": 4})
    write({"twin.a.weight/codes": tensor(4, 0x0308)})
    with pytest.raises(ExportError, match="weight of 'a' at 4 bits"):
        audit.audit_compiled(tmp_path, {"a": 4})
