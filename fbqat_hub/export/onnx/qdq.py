"""Insert QuantizeLinear / DequantizeLinear pairs: our codes for the weights, an encoding for every activation.

                    u16 pair            u8 pair (the layer's own)          u8 pair
    ... -> Mul -> Q -> DQ ------------> Q -> DQ -> Gemm(x, w, b) ---------> Q -> DQ -> ...
                                                       |  |
                    int4 codes, fp32 scale[out] -> DQ -+  +- DQ <- int32 bias, scale = input scale x weight scale

Every tensor has one *primary* encoding, written where it is made; a consumer that wants other bits (or a layer with
its own trained `input_scale`) gets a second pair. 8 to 16 bits is exact: scale / 256, zero point x 256.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.calibration import Ranges, float_tensors
from fbqat_hub.export.onnx.encoding import Encoding, encoding_for_range, trained_encoding
from fbqat_hub.export.onnx.float_graph import FloatGraph, codes_tensor
from fbqat_hub.export.onnx.precision import VIEW_OPS, Precision, node_bits
from fbqat_hub.quantization.clip import max_abs
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.quantization.quantize import quantize_weight
from fbqat_hub.quantization.scheme import WeightScheme

_UNSIGNED: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16}
_NORMS = ("LayerNormalization", "RMSNormalization")


def relu_ranges(model: onnx.ModelProto, ranges: Ranges) -> Ranges:
    """`ranges` with 0 as the low end of every tensor that feeds nothing but a ReLU (through views)."""
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    adjusted = dict(ranges)
    for node in reversed(model.graph.node):
        for name in node.output:
            users = uses.get(name, [])
            positive = [
                user.op_type == "Relu"
                or (
                    user.op_type in VIEW_OPS
                    and all(
                        adjusted.get(output, (-1.0, 0.0))[0] == 0.0 for output in user.output
                    )  # a Split has several
                )
                for user in users
            ]
            if name in adjusted and users and all(positive):
                adjusted[name] = (0.0, adjusted[name][1])
    return adjusted


def trained_tensors(source: FloatGraph) -> dict[str, Encoding]:
    """Tensors all of whose consumers (through views) want one trained encoding: it is made in that one at once."""
    wants: dict[str, set[Encoding | None]] = {}
    for node in reversed(source.model.graph.node):
        for index, name in enumerate(node.input):
            encoding = None
            if node.op_type in ("Gemm", "Conv") and index == 0:
                encoding = trained_encoding(source.layers.get(node.input[1]))
            if node.op_type in VIEW_OPS and node.op_type != "Relu" and index == 0:
                wants.setdefault(name, set()).update(*(wants.get(output, {None}) for output in node.output))
            else:
                wants.setdefault(name, set()).add(encoding)
    return {name: encoding for name, found in wants.items() if len(found) == 1 and (encoding := found.copy().pop())}


class _Inserter:
    """Builds the QDQ graph node by node; one instance a graph."""

    def __init__(self, source: FloatGraph, ranges: Ranges, clipped: Ranges, precision: Precision) -> None:
        self.source, self.precision = source, precision
        self.ranges = relu_ranges(source.model, ranges)
        self.clipped = self.ranges | clipped
        self.constants = {item.name: item for item in source.model.graph.initializer}
        self.floats = set(float_tensors(source.model))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.primary: dict[str, Encoding] = {}
        self.dequantized: dict[tuple[str, Encoding], str] = {}
        self.wanted = trained_tensors(source)
        self.made: set[str] = set()

    # -- small parts ---------------------------------------------------------------------------------------------
    def _store(self, name: str, value: np.ndarray) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _pair(self, source: str, output: str, encoding: Encoding) -> None:
        """Q and DQ of `source` under `encoding`, ending in the tensor `output`."""
        scale = self._store(f"{output}/scale", np.array(encoding.scale, np.float32))
        zero_point = self._store(f"{output}/zero_point", np.array(encoding.zero_point, _UNSIGNED[encoding.bits]))
        self.nodes.append(
            helper.make_node("QuantizeLinear", [source, scale, zero_point], [f"{output}/q"], name=f"{output}/Q")
        )
        self.nodes.append(
            helper.make_node("DequantizeLinear", [f"{output}/q", scale, zero_point], [output], name=f"{output}/DQ")
        )

    def _convert(self, tensor: str, encoding: Encoding) -> str:
        """The float view of `tensor` under `encoding`, adding a pair where it is not the primary one.

        The HTP converts between 8 and 16 bits in integers, but between two encodings of one width only through
        float. So 8 to 8 bits goes by the exact 16-bit form, and 16 to 16 bits through a product with 1.
        """
        key = (tensor, encoding)
        if key in self.dequantized:
            return self.dequantized[key]
        primary = self.primary[tensor]
        source, name = self.dequantized[tensor, primary], f"{tensor}/as_u{encoding.bits}_{len(self.dequantized)}"
        if primary.bits == encoding.bits == 8:
            source = self._widen(tensor, primary)
        elif primary.bits == encoding.bits == 16:
            one = self._quantized(f"{name}/one", np.array(1.0, np.float32), 16)
            self.nodes.append(helper.make_node("Mul", [source, one], [f"{name}/float"], name=f"{name}/requantize"))
            source = f"{name}/float"
        self._pair(source, name, encoding)
        self.dequantized[key] = name
        return name

    def _widen(self, tensor: str, encoding: Encoding) -> str:
        """`tensor` under its 8-bit `encoding`, in the 16-bit encoding of the same values."""
        key = (tensor, encoding.widened())
        if key not in self.dequantized:
            narrow = self.dequantized[tensor, encoding]
            self._pair(narrow, f"{narrow}/wide", encoding.widened())
            self.dequantized[key] = f"{narrow}/wide"
        return self.dequantized[key]

    def _read(self, tensor: str, bits: int, layer: PackedLayer | None = None) -> tuple[str, Encoding]:
        """`tensor` as a consumer of `bits` bits reads it, through `layer`'s trained encoding if it has one."""
        encoding, trained = self.primary[tensor], trained_encoding(layer)
        if trained is not None:
            encoding = trained
        elif encoding.bits > bits:
            encoding = self._encoding(tensor, bits)
        name = self._convert(tensor, encoding)
        if encoding.bits < bits:
            return self._widen(tensor, encoding), encoding.widened()
        return name, encoding

    # -- constants -----------------------------------------------------------------------------------------------
    def _constant(self, name: str, bits: int) -> str:
        """A float constant of the graph, quantized per tensor to `bits` bits."""
        return self._quantized(f"{name}/u{bits}", numpy_helper.to_array(self.constants[name]).astype(np.float32), bits)

    def _quantized(self, output: str, values: np.ndarray, bits: int) -> str:
        """`values`, stored as codes of one encoding that spans them, as the tensor `output`."""
        if output not in self.made:
            self.made.add(output)
            encoding = encoding_for_range(float(values.min()), float(values.max()), bits)
            codes = np.clip(np.round(values / encoding.scale) + encoding.zero_point, 0, 2**bits - 1)
            self._store(f"{output}/codes", codes.astype(_UNSIGNED[bits]))
            scale = self._store(f"{output}/scale", np.array(encoding.scale, np.float32))
            zero_point = self._store(f"{output}/zero_point", np.array(encoding.zero_point, _UNSIGNED[bits]))
            self.nodes.append(
                helper.make_node(
                    "DequantizeLinear", [f"{output}/codes", scale, zero_point], [output], name=f"{output}/DQ"
                )
            )
        return output

    def _weight(self, name: str, layer: PackedLayer | None) -> tuple[str, np.ndarray]:
        """A weight [out, ...], one scale per row: the packed layer's own codes, or INT8 max-abs where left float."""
        output = f"{name}/dq"
        dims = list(self.constants[name].dims)
        if layer is not None:
            codes, scales = layer.codes().cpu(), layer.weight_scale.detach().cpu().float()
            bits = self.precision.stored_bits(layer)
        else:
            values = torch.tensor(numpy_helper.to_array(self.constants[name])).float().flatten(1)
            # a row of zeros gets a scale in which int32 still holds its bias
            codes, scales = quantize_weight(values, WeightScheme(bits=8), clip=max_abs(values).clamp_min(127e-8))
            bits = 8
        scale = scales.numpy()
        if output not in self.made:
            self.made.add(output)
            zeros = torch.zeros(dims[0], dtype=torch.int8)
            self.initializers[f"{name}/codes"] = codes_tensor(f"{name}/codes", codes, dims, bits)
            self.initializers[f"{name}/zero_point"] = codes_tensor(f"{name}/zero_point", zeros, [dims[0]], bits)
            self._store(f"{name}/scale", scale)
            self.nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    [f"{name}/codes", f"{name}/scale", f"{name}/zero_point"],
                    [output],
                    name=f"{name}/DQ",
                    axis=0,
                )
            )
        return output, scale

    def _bias(self, name: str, scale: np.ndarray, node: onnx.NodeProto) -> str:
        """An int32 bias in units of input scale x weight scale, as the integer accumulator counts."""
        output = f"{node.output[0]}/bias"
        codes = np.round(numpy_helper.to_array(self.constants[name]).astype(np.float64) / scale)
        if np.abs(codes).max() > 2**31 - 1:
            row = int(np.abs(codes).argmax())
            raise ExportError(
                f"bias {name!r} row {row} is {np.abs(codes).max():.3g} in units of input scale x weight scale "
                f"({scale[row]:.3g}), more than int32 holds: the row's weight scale is far too small"
            )
        self._store(f"{output}/codes", codes.astype(np.int32))
        self._store(f"{output}/scale", scale)
        self._store(f"{output}/zero_point", np.zeros(scale.shape, np.int32))
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{output}/codes", f"{output}/scale", f"{output}/zero_point"],
                [output],
                name=f"{output}/DQ",
                axis=0,
            )
        )
        return output

    # -- nodes ---------------------------------------------------------------------------------------------------
    def _copy(self, node: onnx.NodeProto) -> onnx.NodeProto:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.ClearField("metadata_props")
        copied.ClearField("doc_string")
        for name in node.input:
            if name in self.constants and self.constants[name].data_type != TensorProto.FLOAT:
                self.initializers.setdefault(name, self.constants[name])
        return copied

    def _finish(self, node: onnx.NodeProto, copied: onnx.NodeProto, encodings: dict[str, Encoding]) -> None:
        """Append `copied`, then the primary pair of each output; the graph's output keeps its name."""
        for index, name in enumerate(node.output):
            if name in encodings:
                copied.output[index] = f"{name}/float"
        self.nodes.append(copied)
        outputs = {value.name for value in self.source.model.graph.output}
        for name, encoding in encodings.items():
            self.primary[name] = encoding
            quantized = name if name in outputs else f"{name}/u{encoding.bits}"
            self._pair(f"{name}/float", quantized, encoding)
            self.dequantized[name, encoding] = quantized

    def _view(self, node: onnx.NodeProto) -> None:
        copied, source = self._copy(node), node.input[0]
        if source not in self.primary:  # a view of a constant or of integers: nothing to quantize
            self.nodes.append(copied)
            return
        encoding = self.primary[source]
        copied.input[0] = self.dequantized[source, encoding]
        self._finish(node, copied, dict.fromkeys(node.output, encoding))

    def _compute(self, node: onnx.NodeProto) -> None:
        copied, constants = self._copy(node), self.constants
        bits = node_bits(node, self.precision, self.source.layers, self.source.module_names, constants)
        weighted = node.op_type in ("Gemm", "Conv") and node.input[1] in constants
        layer = self.source.layers.get(node.input[1]) if weighted else None
        if weighted:
            copied.input[0], encoding = self._read(node.input[0], bits.inputs[0], layer)
            copied.input[1], weight_scale = self._weight(node.input[1], layer)
            if len(node.input) > 2:
                scale = (np.float32(encoding.scale) * weight_scale).astype(np.float32)
                copied.input[2] = self._bias(node.input[2], scale, node)
        else:
            for index, name in enumerate(node.input):
                if name in self.primary:
                    copied.input[index] = self._read(name, bits.inputs[index])[0]
                elif name in constants and constants[name].data_type == TensorProto.FLOAT:
                    # a norm's gamma must be uint8: the HTP's LayerNorm takes no 4-bit one
                    copied.input[index] = self._constant(name, 8 if node.op_type in _NORMS else bits.inputs[index])
        encodings = {name: self._made_encoding(node, name, bits.output) for name in node.output if name in self.floats}
        self._finish(node, copied, encodings)

    def _floor(self, node: onnx.NodeProto) -> None:
        """max(tensor, constant): the constant in the tensor's own encoding, and if positive at least one step.

        In an encoding of its own a floor of 1e-15 would round to 0 on the way out, and guard no division.
        """
        copied, (tensor, constant) = self._copy(node), node.input
        copied.input[0], encoding = self._read(tensor, self.precision.op_bits("other"))
        value = float(numpy_helper.to_array(self.constants[constant]))
        steps = max(round(value / encoding.scale), 1 if value > 0 else 0)
        output = f"{node.output[0]}/floor"
        code = np.array(min(encoding.zero_point + steps, 2**encoding.bits - 1), _UNSIGNED[encoding.bits])
        inputs = [
            self._store(f"{output}/codes", code),
            self._store(f"{output}/scale", np.array(encoding.scale, np.float32)),
            self._store(f"{output}/zero_point", np.array(encoding.zero_point, _UNSIGNED[encoding.bits])),
        ]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=f"{output}/DQ"))
        copied.input[1] = output
        self._finish(node, copied, {node.output[0]: encoding})

    def _is_scalar(self, name: str) -> bool:
        return name in self.constants and not self.constants[name].dims

    def _made_encoding(self, node: onnx.NodeProto, name: str, bits: int) -> Encoding:
        if node.op_type in ("Softmax", "Sigmoid"):
            return Encoding(1 / 2**bits, 0, bits)  # [0, 1), the one scale the HTP's tables are made for
        if node.op_type == "Tanh" and bits == 16:
            return Encoding(2 / 2**bits, 2 ** (bits - 1), bits)  # [-1, 1): of small values another is silently wrong
        wanted = self.wanted.get(name)
        if wanted is not None and wanted.bits == bits:
            return wanted
        return self._encoding(name, bits)

    def _encoding(self, tensor: str, bits: int) -> Encoding:
        return encoding_for_range(*(self.clipped if bits == 8 else self.ranges)[tensor], bits)

    def build(self) -> onnx.ModelProto:
        graph = self.source.model.graph
        for value in graph.input:
            encoding = encoding_for_range(*self.ranges[value.name], 16)
            self.primary[value.name] = encoding
            self._pair(value.name, f"{value.name}/u16", encoding)
            self.dequantized[value.name, encoding] = f"{value.name}/u16"
        for node in graph.node:
            if node.op_type in VIEW_OPS:
                self._view(node)
            elif node.op_type == "Max" and len(node.input) == 2 and self._is_scalar(node.input[1]):
                self._floor(node)
            else:
                self._compute(node)
        made = helper.make_graph(
            self.nodes, "qdq", list(graph.input), list(graph.output), list(self.initializers.values())
        )
        model = helper.make_model(made, opset_imports=list(self.source.model.opset_import), producer_name="fbqat_hub")
        model.ir_version = 10
        onnx.checker.check_model(model, full_check=True)
        return model


def insert_qdq(
    source: FloatGraph, ranges: Ranges, precision: Precision | None = None, *, clipped: Ranges | None = None
) -> onnx.ModelProto:
    """The QDQ graph of a rewritten float graph.

    Args:
        source: the graph and its packed layers.
        ranges: of every float tensor, from `calibrate`.
        precision: which op computes at how many activation bits.
        clipped: ranges in place of `ranges` where a tensor has 8 bits (`clipping.clipped_ranges`).

    Returns:
        An ONNX model of float32 inputs and outputs whose every op sits between DequantizeLinear and QuantizeLinear.

    Raises:
        ExportError: a bias does not fit in int32, or a layer's static encoding is incomplete.
    """
    return _Inserter(source, ranges, clipped or {}, precision or Precision()).build()
