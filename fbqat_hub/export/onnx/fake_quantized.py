"""A QDQ graph as a torch module: the same arithmetic, with gradients to every scale, zero point and bias.

A QuantizeLinear / DequantizeLinear pair becomes fake quantization: rounding has the straight-through gradient, the
scale that of learned step sizes (LSQ, arXiv 1902.08153, equation 3), the zero point that of LSQ+ (arXiv 2004.09576).
What one encoding governs in the graph stays one here: views share their input's, the exact 16-bit form of an 8-bit
tensor follows it, a bias counts in input scale x weight scale, a floor in its tensor's steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.encoding import Encoding
from fbqat_hub.export.onnx.precision import VIEW_OPS
from fbqat_hub.export.onnx.torch_ops import TorchOp, torch_op

_BITS = {np.dtype(np.uint8): 8, np.dtype(np.uint16): 16}
_UNSIGNED: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16}


@dataclass(frozen=True)
class _Place:
    """Where a pair takes its encoding from: the `index`-th one, or the exact 16-bit form of that."""

    index: int
    widened: bool


@dataclass(frozen=True)
class _Weight:
    """A weight of one scale per row: names of its constants, its dimensions."""

    codes: str
    scale: str
    dims: tuple[int, ...]


class FakeQuantizedGraph(nn.Module):
    """A QDQ graph of `qdq.insert_qdq`, computed in torch.

    Its parameters, all in units of what they start from, so that one learning rate suits them:

        scales [encodings]        log of the factor on each activation's scale
        zero_points [encodings]   shift of each zero point, in widths of the range
        row_scales.<i> [out]      log of the factor on each scale of a weight
        biases.<i> [out]          shift of a bias, in 1/64 of its output's range

    A weight's codes stay as they are.

    Args:
        model: the QDQ graph.

    Raises:
        ExportError: an op that is not known here.
    """

    _scale: Tensor
    _zero_point: Tensor
    _top: Tensor
    _scale_moves: Tensor
    _zero_point_moves: Tensor

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self._model = model
        graph = model.graph
        self._constants = {item.name: item for item in graph.initializer}
        self._producer = {name: node for node in graph.node for name in node.output}
        self._input_names = [value.name for value in graph.input]
        self._output_names = [value.name for value in graph.output]
        self._encodings: list[Encoding] = []
        self._fixed: list[bool] = []
        self._one_sided: set[int] = set()
        self._places: dict[str, _Place] = {}  # by the tensor that a pair ends in
        self._same: set[str] = set()  # of these, whose pair changes no value: it lies on the encoding's grid already
        self._weights: dict[str, _Weight] = {}  # by the dequantized tensor
        self._biases: dict[str, onnx.NodeProto] = {}  # dequantized -> the node that adds it
        self._constant_names: list[str] = []  # dequantized, of all others
        self._floors: dict[str, tuple[str, float]] = {}  # dequantized -> the tensor in whose steps it counts, its value
        self._steps: list[tuple[onnx.NodeProto, TorchOp | None]] = []
        readers: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            readers.update(dict.fromkeys(node.input, node))
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in self._constants:
                self._add_constant(node, readers[node.output[0]])
            elif node.op_type == "DequantizeLinear":
                self._add_pair(node)
                self._steps.append((node, None))
            elif node.op_type != "QuantizeLinear":
                self._steps.append((node, torch_op(node, self._constants)))
        self._add_parameters()

    # -- reading the graph ---------------------------------------------------------------------------------------
    def _array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._constants[name])

    def _stored(self, dequantize: onnx.NodeProto) -> Encoding:
        zero_point = self._array(dequantize.input[2])
        return Encoding(float(self._array(dequantize.input[1])), int(zero_point), _BITS[zero_point.dtype])

    def _add_constant(self, node: onnx.NodeProto, reader: onnx.NodeProto) -> None:
        name, stored = node.output[0], self._constants[node.input[0]]
        if stored.data_type in (TensorProto.INT4, TensorProto.INT8):
            self._weights[name] = _Weight(node.input[0], node.input[1], tuple(stored.dims))
        elif stored.data_type == TensorProto.INT32:
            self._biases[name] = reader
        else:
            encoding = self._stored(node)
            codes = self._array(node.input[0]).astype(np.float32)
            value = torch.tensor((codes - encoding.zero_point) * np.float32(encoding.scale))
            if reader.op_type == "Max":
                self._floors[name] = (reader.input[0], float(value))
            else:
                self.register_buffer(f"_constant_{len(self._constant_names)}", value[None])
                self._constant_names.append(name)

    def _add_pair(self, node: onnx.NodeProto) -> None:
        """Where the pair that ends with `node` takes its encoding from."""
        encoding, source = self._stored(node), self._producer[node.input[0]].input[0]
        made = self._producer.get(source)
        viewed = made is not None and (made.op_type in VIEW_OPS or made.input[-1] in self._floors)
        if made is not None and viewed and made.input[0] in self._places:
            place = self._places[made.input[0]]
            self._check(node, encoding, place)
            self._same.add(node.output[0])
        elif made is not None and made.op_type == "DequantizeLinear" and self._is_wide_form(source, encoding):
            place = _Place(self._places[source].index, widened=True)
            self._same.add(node.output[0])
        else:
            place = _Place(len(self._encodings), widened=False)
            self._encodings.append(encoding)
            # the HTP's tables of these are made for the one scale
            self._fixed.append(made is not None and made.op_type in ("Softmax", "Sigmoid", "Tanh"))
        if encoding.zero_point in (0, 2**encoding.bits - 1):
            self._one_sided.add(place.index)
        self._places[node.output[0]] = place

    def _is_wide_form(self, source: str, encoding: Encoding) -> bool:
        place = self._places[source]
        return (
            not place.widened
            and self._encodings[place.index].bits == 8
            and encoding == self._encoding_at(_Place(place.index, True))
        )

    def _encoding_at(self, place: _Place) -> Encoding:
        encoding = self._encodings[place.index]
        return encoding.widened() if place.widened else encoding

    def _check(self, node: onnx.NodeProto, encoding: Encoding, place: _Place) -> None:
        if encoding != self._encoding_at(place):
            raise ExportError(f"{node.output[0]!r} has the encoding {encoding}, its input another: not one of ours")

    def _add_parameters(self) -> None:
        count = len(self._encodings)
        self.scales, self.zero_points = nn.Parameter(torch.zeros(count)), nn.Parameter(torch.zeros(count))
        self.register_buffer("_scale", torch.tensor([each.scale for each in self._encodings]))
        self.register_buffer("_zero_point", torch.tensor([float(each.zero_point) for each in self._encodings]))
        self.register_buffer("_top", torch.tensor([float(2**each.bits - 1) for each in self._encodings]))
        fixed = torch.tensor(self._fixed)
        one_sided = torch.tensor([index in self._one_sided for index in range(count)])
        self.register_buffer("_scale_moves", (~fixed).float())
        self.register_buffer("_zero_point_moves", (~fixed & ~one_sided).float())
        self.row_scales, self.biases = nn.ParameterList(), nn.ParameterList()
        for number, weight in enumerate(self._weights.values()):
            codes = torch.tensor(self._array(weight.codes).astype(np.float32)).reshape(weight.dims)
            self.register_buffer(f"_codes_{number}", codes)
            self.row_scales.append(nn.Parameter(torch.zeros(weight.dims[0])))
            self.register_buffer(f"_row_scale_{number}", torch.tensor(self._array(weight.scale)))
        ends = {self._source(end): end for end in self._places}
        for number, (name, reader) in enumerate(self._biases.items()):
            counts, unit = (self._array(each) for each in self._producer[name].input[:2])
            self.biases.append(nn.Parameter(torch.zeros(counts.shape)))
            self.register_buffer(f"_bias_{number}", torch.tensor((counts * unit.astype(np.float64)).astype(np.float32)))
            output = self._encoding_at(self._places[ends[reader.output[0]]])
            self.register_buffer(f"_bias_unit_{number}", torch.tensor(output.scale * 2**output.bits / 64))

    def _source(self, end: str) -> str:
        return str(self._producer[self._producer[end].input[0]].input[0])

    # -- what is deployed ----------------------------------------------------------------------------------------
    def encodings(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each encoding, float32 [encodings]; zero points are whole numbers."""
        scale = self._scale * torch.exp(self.scales * self._scale_moves)
        free = self._zero_point + self.zero_points * self._zero_point_moves * self._top
        zero_point = _straight_through(free, free.round().clamp(torch.zeros_like(self._top), self._top))
        return scale, zero_point

    def row_scale(self, number: int) -> Tensor:
        """The scales of the `number`-th weight, float32 [out]."""
        scale: Tensor = getattr(self, f"_row_scale_{number}") * torch.exp(self.row_scales[number])
        return scale

    def bias(self, number: int) -> Tensor:
        """The `number`-th bias before it is rounded, float32 [out]."""
        value: Tensor = getattr(self, f"_bias_{number}") + self.biases[number] * getattr(self, f"_bias_unit_{number}")
        return value

    def scale_of(self, codes: str) -> Tensor:
        """The scales, float32 [out], of the weight whose codes the graph calls so."""
        return self.row_scale(next(number for number, each in enumerate(self._weights.values()) if each.codes == codes))

    def input_encoding(self, codes: str) -> Encoding:
        """The encoding, before it is widened, in which the layer of that weight reads its input."""
        weight = next(name for name, each in self._weights.items() if each.codes == codes)
        reader = next(node for node, _ in self._steps if weight in node.input)
        index = self._places[reader.input[0]].index
        scale, zero_point = self.encodings()
        return Encoding(float(scale[index]), int(zero_point[index]), self._encodings[index].bits)

    def forward(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of the graph, by name.

        Args:
            feed: the graph's inputs by name, float32, with samples in front: [samples, *shape in the graph].

        Returns:
            As many samples of each output.
        """
        scale, zero_point = self.encodings()
        scales, zero_points, tops = scale.unbind(), zero_point.unbind(), self._top.tolist()
        values: dict[str, Tensor] = {name: feed[name] for name in self._input_names}
        values.update(self._constant_values(scales))
        for node, op in self._steps:
            if op is not None:
                made = op(*(values[name] for name in op.tensors))
                outputs = made if isinstance(made, Sequence) else (made,)
                values.update(zip(node.output, outputs, strict=True))
                continue
            (name,) = node.output
            index, value = self._places[name].index, values[self._source(name)]
            if name not in self._same:
                value = _FakeQuantize.apply(value, scales[index], zero_points[index], tops[index])
            values[name] = value
        return {name: values[name] for name in self._output_names}

    def _step_of(self, tensor: str, scales: Sequence[Tensor]) -> Tensor:
        place = self._places[tensor]
        return scales[place.index] / 256 if place.widened else scales[place.index]

    def _constant_values(self, scales: Sequence[Tensor]) -> dict[str, Tensor]:
        values = {name: getattr(self, f"_constant_{number}") for number, name in enumerate(self._constant_names)}
        row_scales = {}
        for number, name in enumerate(self._weights):
            row_scales[name] = self.row_scale(number)
            codes = getattr(self, f"_codes_{number}")
            values[name] = (codes * row_scales[name].reshape(-1, *[1] * (codes.dim() - 1)))[None]
        for number, (name, reader) in enumerate(self._biases.items()):
            unit = (self._step_of(reader.input[0], scales) * row_scales[reader.input[1]]).detach()
            free = self.bias(number)
            values[name] = _straight_through(free, (free / unit).round() * unit)[None]
        for name, (source, value) in self._floors.items():
            step = self._step_of(source, scales).detach()
            values[name] = (step * self._floor_steps(value, step))[None]
        return values

    @staticmethod
    def _floor_steps(value: float, step: Tensor) -> Tensor:
        return torch.round(value / step).clamp_min(1.0 if value > 0 else 0.0)

    @torch.no_grad()
    def to_onnx(self) -> onnx.ModelProto:
        """The graph with what the parameters are now; nothing else of it is changed.

        Raises:
            ExportError: a bias that int32 does not hold.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        scale, zero_point = self.encodings()
        changed: dict[str, onnx.TensorProto] = {}

        def store(name: str, value: np.ndarray) -> None:
            changed[name] = numpy_helper.from_array(value, name)

        for end, place in self._places.items():
            bits = 16 if place.widened else self._encodings[place.index].bits
            factor = 256 if place.widened else 1
            _, scale_name, zero_point_name = self._producer[end].input
            store(scale_name, (scale[place.index] / factor).numpy())
            store(zero_point_name, np.array(int(zero_point[place.index]) * factor, _UNSIGNED[bits]))
        row_scales = {}
        for number, (name, weight) in enumerate(self._weights.items()):
            row_scales[name] = self.row_scale(number)
            store(weight.scale, row_scales[name].numpy())
        for number, (name, reader) in enumerate(self._biases.items()):
            unit = self._step_of(reader.input[0], scale.unbind()) * row_scales[reader.input[1]]
            bias = (self.bias(number) / unit).round().double().numpy()
            if np.abs(bias).max() > 2**31 - 1:
                raise ExportError(f"bias {name!r} left int32 while it was tuned; take fewer steps")
            codes_name, scale_name, _ = self._producer[name].input
            store(codes_name, bias.astype(np.int32))
            store(scale_name, unit.numpy())
        for name, (source, value) in self._floors.items():
            step = self._step_of(source, scale.unbind())
            place = self._places[source]
            zero = int(zero_point[place.index]) * (256 if place.widened else 1)
            codes_name, scale_name, zero_point_name = self._producer[name].input
            kind = self._array(zero_point_name).dtype
            code = min(zero + int(self._floor_steps(value, step)), np.iinfo(kind).max)
            store(codes_name, np.array(code, kind))
            store(scale_name, step.numpy())
            store(zero_point_name, np.array(zero, kind))
        for index, item in enumerate(model.graph.initializer):
            if item.name in changed:
                model.graph.initializer[index].CopyFrom(changed[item.name])
        onnx.checker.check_model(model)
        return model


def _straight_through(free: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `free`."""
    return free + (rounded - free).detach() if free.requires_grad else rounded


class _FakeQuantize(torch.autograd.Function):
    """scale * (clamp(round(x / scale) + zero_point, 0, top) - zero_point), as ONNX Runtime computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: float) -> Tensor:
        ratio = x / scale
        codes = ratio.round()
        shown = codes.clamp(-float(zero_point), top - float(zero_point))
        inside = shown == codes
        # shown - ratio, or shown where it is clipped: d y / d scale. Two sums of products, of which one is subtracted
        # from the other, would leave nothing of it at 16 bits
        ctx.save_for_backward(shown - ratio.mul_(inside), inside, scale)
        return shown * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        slope, inside, scale = ctx.saved_tensors
        through = grad * inside
        return through, (grad * slope).sum(), (through.sum() - grad.sum()) * scale, None
