"""Checks of what was made, from the files alone: "compiled" is not "right", "all on QNN" is not "all quantized".

Three places are read back: the QDQ graph (are the weights our codes, is every op between DQ and Q), the compiler's
own JSON description of the graph (which data types did it really give its tensors), and the context's ONNX wrapper
(is everything in it, what was it built for). Nothing here shares code with the part that writes the QDQ graph.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.families.graph import TWIN
from fbqat_hub.quantization.packed import PackedLayer

#: QNN's numbers, from the public API reference of the Qualcomm AI Runtime SDK (Qnn_DataType_t, Qnn_TensorType_t,
#: Qnn_QuantizationEncoding_t).
QNN_DATA_TYPES = {
    0x0008: "int8", 0x0016: "int16", 0x0032: "int32", 0x0064: "int64",
    0x0108: "uint8", 0x0116: "uint16", 0x0132: "uint32", 0x0164: "uint64",
    0x0216: "float16", 0x0232: "float32", 0x0264: "float64", 0x0508: "bool",
    0x0304: "sfixed4", 0x0308: "sfixed8", 0x0316: "sfixed16", 0x0332: "sfixed32",
    0x0404: "ufixed4", 0x0408: "ufixed8", 0x0416: "ufixed16", 0x0432: "ufixed32",
}  # fmt: skip
_GRAPH_INPUT, _GRAPH_OUTPUT, _STATIC = 0, 1, 4
_BITWIDTH_AXIS_ENCODING = 3


def unpack_int4(raw: bytes, count: int) -> np.ndarray:
    """ONNX INT4 bytes to int8 codes -8..7, [count]: two a byte, low nibble first.

    >>> unpack_int4(bytes.fromhex("f107"), 3).tolist()
    [1, -1, 7]
    """
    data = np.frombuffer(raw, np.uint8)
    nibbles = np.stack([data & 0xF, data >> 4], axis=1).reshape(-1)[:count].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)


def _fail(what: str) -> ExportError:
    return ExportError(f"the export's own audit failed: {what}. This is a bug in the exporter, not in your model")


def audit_qdq(
    model: onnx.ModelProto, layers: Mapping[str, PackedLayer], precision: Precision | None = None
) -> dict[str, Any]:
    """Check the QDQ graph against the packed layers (by module name), bit for bit.

    Every packed layer's weight must be stored in the bits that `precision` gives it, with the layer's codes and
    scales, and zero points of 0; a static input encoding must be the layer's; every float tensor must come from a
    DequantizeLinear and go to a QuantizeLinear.

    Returns:
        Counts for the certificate.

    Raises:
        ExportError: the first difference, with the tensor's name.
    """
    graph, precision = model.graph, precision or Precision()
    constants = {item.name: item for item in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    users = Counter(name for node in graph.node for name in node.input)
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    readers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type in ("Gemm", "Conv"):
            readers[producer[node.input[1]].input[0]] = node
    equal = static = 0
    for name, layer in layers.items():
        codes_name = f"{TWIN}.{name}.weight/codes"
        if codes_name not in readers or codes_name not in constants:
            raise _fail(f"no Gemm or Conv reads the codes of packed layer {name!r}")
        _audit_weight(name, layer, constants, producer[readers[codes_name].input[1]], precision.stored_bits(layer))
        equal += 1
        if layer.input_scale is not None:
            _audit_input(name, layer, readers[codes_name], producer, constants)
            static += 1
    kinds: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        kinds[node.op_type] += 1
        for name in node.input:
            made = producer.get(name)
            float_constant = name in constants and constants[name].data_type == TensorProto.FLOAT
            if float_constant or (made is not None and made.op_type != "DequantizeLinear"):
                raise _fail(f"{node.op_type} {node.name!r} reads float tensor {name!r}")
        for name in node.output:
            if users[name] != 1 or name not in quantized:
                raise _fail(f"output {name!r} of {node.op_type} is not quantized")
    weights = Counter(TensorProto.DataType.Name(constants[name].data_type).lower() for name in readers)
    return {
        "packed_weights_bit_equal": equal,
        "static_input_encodings_bit_equal": static,
        "weights_by_type": dict(sorted(weights.items())),
        "ops": dict(sorted(kinds.items())),
    }


def _audit_weight(
    name: str,
    layer: PackedLayer,
    constants: Mapping[str, onnx.TensorProto],
    dequantize: onnx.NodeProto,
    weight_bits: int,
) -> None:
    stored, scale, zero_point = (constants[item] for item in dequantize.input)
    kind = TensorProto.INT4 if weight_bits == 4 else TensorProto.INT8
    if stored.data_type != kind:
        raise _fail(f"weight of {name!r} is {TensorProto.DataType.Name(stored.data_type)}, not INT{weight_bits}")
    if helper.get_node_attr_value(dequantize, "axis") != 0 or stored.dims[0] != layer.out_features:
        raise _fail(f"weight of {name!r} is not scaled along its outputs")
    if weight_bits == 4:
        codes = unpack_int4(stored.raw_data, int(np.prod(stored.dims)))
    else:
        codes = np.frombuffer(stored.raw_data, np.int8)
    if not np.array_equal(codes.reshape(layer.out_features, -1), layer.codes().cpu().numpy()):
        raise _fail(f"codes of {name!r} differ from the packed layer's")
    if numpy_helper.to_array(scale).tobytes() != layer.weight_scale.detach().cpu().numpy().tobytes():
        raise _fail(f"scales of {name!r} differ from the packed layer's")
    if any(zero_point.raw_data):
        raise _fail(f"zero points of {name!r} are not 0")


def _audit_input(
    name: str,
    layer: PackedLayer,
    node: onnx.NodeProto,
    producer: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> None:
    """The trained encoding must be the last or (before exact widening to 16 bits) the last but one before `node`."""
    assert layer.input_scale is not None
    assert layer.input_zero_point is not None
    tensor = node.input[0]
    for _ in range(2):
        dequantize = producer[tensor]
        scale = float(numpy_helper.to_array(constants[dequantize.input[1]]))
        zero_point = constants[dequantize.input[2]]
        bits = 8 * numpy_helper.to_array(zero_point).itemsize
        same = (scale, int(numpy_helper.to_array(zero_point)), bits)
        if same == (float(layer.input_scale), int(layer.input_zero_point), layer.activation_bits):
            return
        tensor = producer[dequantize.input[0]].input[0]
        if tensor not in producer or producer[tensor].op_type != "DequantizeLinear":
            break
    raise _fail(f"the input of {name!r} is not quantized with the layer's trained scale and zero point")


def audit_compiled(graph_folder: Path, stored: Mapping[str, int]) -> dict[str, Any]:
    """Check the data types the compiler gave its tensors, from its JSON dump (the file that is not `_tensor_log`).

    Args:
        graph_folder: of the dump.
        stored: packed layer -> bits at which its weight must be stored, 4 or 8.

    Returns:
        Tensors by data type (weights of a 4-bit encoding as `sfixed4`), ops by type.

    Raises:
        ExportError: no dump, more than one graph, a packed weight of other bits, or a float tensor inside.
    """
    dumps = [path for path in graph_folder.glob("*.json") if not path.stem.endswith("_tensor_log")]
    if len(dumps) != 1:
        raise _fail(f"the compiler described {len(dumps)} graphs, expected one (is part of the graph not on QNN?)")
    graph = json.loads(dumps[0].read_text())["graph"]
    kinds: Counter[str] = Counter()
    for name, tensor in graph["tensors"].items():
        kind = QNN_DATA_TYPES.get(tensor["data_type"], hex(tensor["data_type"]))
        if _stored_bits(tensor) == 4:
            kind = "sfixed4"
        if kind.startswith("float") and tensor["type"] not in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            raise _fail(f"tensor {name!r} is {kind} inside the compiled graph")
        kinds[kind] += 1
    for layer, bits in stored.items():
        weight = graph["tensors"].get(f"{TWIN}.{layer}.weight/codes")
        if weight is None or weight["type"] != _STATIC or (_stored_bits(weight) == 4) != (bits == 4):
            raise _fail(f"the compiler did not keep the weight of {layer!r} at {bits} bits")
    ops = Counter(node["type"] for node in graph["nodes"].values())
    return {
        "tensors_by_type": dict(sorted(kinds.items())),
        "ops": dict(sorted(ops.items())),
        "nodes": sum(ops.values()),
    }


def _stored_bits(tensor: Mapping[str, Any]) -> int | None:
    """The bit width of a per-axis encoding that has one.

    The dump writes the encoding's first 8 bytes as {scale: float, offset: int}; for this encoding they are
    {bitwidth: uint32, axis: int32}, so the "scale" holds the bit width's bits.
    """
    parameters = tensor["quant_params"]
    if parameters["encoding"] != _BITWIDTH_AXIS_ENCODING:
        return None
    return int(struct.unpack("<I", struct.pack("<f", parameters["scale_offset"]["scale"]))[0])


def audit_context(context: onnx.ModelProto, target: Target) -> dict[str, Any]:
    """Check that the compiled context holds the whole graph and says it was built for `target`.

    Returns:
        The SDK build and the compatibility string ONNX Runtime wrote; null where it wrote none.

    Raises:
        ExportError: anything beside one EPContext node, or another SoC or architecture.
    """
    nodes = [node.op_type for node in context.graph.node]
    if nodes != ["EPContext"]:
        raise _fail(f"the context holds {nodes} instead of one EPContext node: part of the graph is not on QNN")
    built_for = next(
        (item.value for item in context.metadata_props if item.key.startswith("ep_compatibility_info")), None
    )
    wanted = f":{target.htp_arch}:{target.soc_model}:{target.vtcm_mb}:"
    if built_for is not None and wanted not in f":{built_for}:":
        raise _fail(f"the context says it was built for {built_for!r}, which lacks architecture:SoC:VTCM {wanted!r}")
    sdk = {item.name: item.s.decode() for item in context.graph.node[0].attribute if item.type == item.STRING}
    return {"qnn_sdk_build": sdk.get("ep_sdk_version"), "compatibility_info": built_for}


def spill_fill_bytes(context: onnx.ModelProto) -> int:
    """DDR bytes the compiler set aside for tensors that its plan moves out of VTCM and back, by its own account.

    The HTP's option `enable_htp_spill_fill_buffer` of ONNX Runtime's QNN execution provider puts them into the
    EPContext node as `max_size` (EP context design, onnxruntime.ai).
    """
    return int(helper.get_node_attr_value(context.graph.node[0], "max_size"))
