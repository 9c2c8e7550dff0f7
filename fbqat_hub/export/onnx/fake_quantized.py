"""A QDQ graph as a torch module: the same arithmetic, with gradients to every scale, zero point and bias.

A QuantizeLinear / DequantizeLinear pair becomes fake quantization: rounding has the straight-through gradient, the
scale that of learned step sizes (LSQ, arXiv 1902.08153, equation 3), the zero point that of LSQ+ (arXiv 2004.09576).
What one encoding governs in the graph stays one here: views share their input's, the exact 16-bit form of an 8-bit
tensor follows it, a bias counts in input scale x weight scale, a floor in its tensor's steps.

Every tensor has one dimension more than in the graph, in front: samples, or 1 for constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.encoding import Encoding
from fbqat_hub.export.onnx.precision import VIEW_OPS

_BITS = {np.dtype(np.uint8): 8, np.dtype(np.uint16): 16}
_UNSIGNED: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16}


@dataclass(frozen=True)
class _Place:
    """Where a pair takes its encoding from: the `index`-th one, or the exact 16-bit form of that."""

    index: int
    widened: bool


@dataclass(frozen=True)
class _Weight:
    """A weight of one scale a row: names of its constants, its dimensions."""

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
        self._steps: list[tuple[onnx.NodeProto, _Op | None]] = []
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
                self._steps.append((node, _op(node, self._constants)))
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
                values.update(zip(node.output, outputs, strict=False))
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


# -- ops -----------------------------------------------------------------------------------------------------------


class _Op:
    """One node: what it computes of its tensors; integer constants (shapes, axes) are read once.

    Attributes:
        tensors: names of the inputs that are tensors.
    """

    def __init__(self, node: onnx.NodeProto, tensors: list[str], compute: Callable[..., Any]) -> None:
        self.tensors, self._compute = tensors, compute

    def __call__(self, *tensors: Tensor) -> Any:
        return self._compute(*tensors)


def _op(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> _Op:
    if node.op_type not in _OPS:
        raise ExportError(
            f"op {node.op_type} ({node.name or node.output[0]}) cannot be tuned: torch has no form of it here"
        )
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    whole = [
        numpy_helper.to_array(constants[name]).reshape(-1).tolist() if name in constants else None
        for name in node.input
    ]
    tensors = [name for name, value in zip(node.input, whole, strict=True) if value is None and name]
    return _Op(node, tensors, _OPS[node.op_type](attributes, whole, len(node.output)))


_Made = Callable[..., Any]
_Whole = Sequence[Sequence[int] | None]


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """The tensors with as many dimensions each, new ones behind the samples."""
    most = max(tensor.dim() for tensor in tensors)
    return [tensor[(slice(None), *[None] * (most - tensor.dim()))] for tensor in tensors]


def _behind(axis: int) -> int:
    """An axis of the graph where there are samples in front."""
    return axis + 1 if axis >= 0 else axis


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[dict[str, Any], _Whole, int], _Made]:
    return lambda attributes, whole, outputs: lambda first, second: compute(*_aligned(first, second))


def _unary(compute: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], _Whole, int], _Made]:
    return lambda attributes, whole, outputs: compute


def _gemm(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    if {attributes.get("alpha", 1.0), attributes.get("beta", 1.0)} != {1.0} or attributes.get("transA", 0):
        raise ExportError("a Gemm with alpha, beta or transA cannot be tuned")
    turned = bool(attributes.get("transB", 0))

    def compute(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == 1:
            return F.linear(rows, weight[0] if turned else weight[0].T, None if bias is None else bias[0])
        product = rows @ (weight.mT if turned else weight)
        return product if bias is None else product + bias[:, None]

    return compute


def _conv(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    sides = len(attributes["kernel_shape"])
    pads = attributes.get("pads", [0] * 2 * sides)
    if pads[:sides] != pads[sides:]:
        raise ExportError(f"a Conv with the pads {pads} cannot be tuned: they must be the same on both sides")

    # torch has no fast way for these in float32 on a CPU
    pointwise = attributes["kernel_shape"] == [1] * sides and set(attributes.get("strides", [1])) == {1}
    pointwise = pointwise and not any(pads) and attributes.get("group", 1) == 1

    def compute(picture: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        function = {1: F.conv1d, 2: F.conv2d}[sides]
        if pointwise:
            made = weight[0].flatten(1) @ picture.flatten(3)
            made = made if bias is None else made + bias[0, :, None]
            return made.unflatten(-1, picture.shape[3:])
        made = function(
            picture.flatten(0, 1),
            weight[0],
            None if bias is None else bias[0],
            attributes.get("strides", 1),
            pads[:sides],
            attributes.get("dilations", 1),
            attributes.get("group", 1),
        )
        return made.unflatten(0, picture.shape[:2])

    return compute


def _layer_norm(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    epsilon = attributes.get("epsilon", 1e-5)

    def compute(x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape[1:], eps=epsilon) * _aligned(x, weight)[1]

    return compute


def _rms_norm(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    epsilon = attributes.get("epsilon", 1e-5)

    def compute(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape[1:], eps=epsilon) * _aligned(x, weight)[1]

    return compute


def _gelu(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    approximate = attributes.get("approximate", b"none").decode()
    return lambda x: F.gelu(x, approximate=approximate)


def _softmax(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    axis = _behind(attributes.get("axis", -1))
    return lambda x: x.softmax(axis)


def _reduce(compute: Callable[..., Tensor]) -> Callable[[dict[str, Any], _Whole, int], _Made]:
    def make(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
        given = whole[1] if len(whole) > 1 else attributes.get("axes")
        keep = bool(attributes.get("keepdims", 1))

        def reduce(x: Tensor) -> Tensor:
            axes = range(x.dim() - 1) if given is None else given
            return compute(x, dim=[_behind(axis) for axis in axes], keepdim=keep)

        return reduce

    return make


def _reshape(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    shape = whole[1]
    assert shape is not None
    return lambda x: x.reshape(len(x), *(x.shape[1 + place] if side == 0 else side for place, side in enumerate(shape)))


def _transpose(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    order = [0, *(axis + 1 for axis in attributes["perm"])]
    return lambda x: x.permute(order)


def _split(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    axis, sizes = _behind(attributes.get("axis", 0)), whole[1] if len(whole) > 1 else None
    if sizes is None:
        return lambda x: x.chunk(outputs, axis)
    return lambda x: x.split(list(sizes), axis)


def _slice(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    starts, ends = whole[1], whole[2]
    assert starts is not None
    assert ends is not None
    axes = whole[3] if len(whole) > 3 and whole[3] is not None else range(len(starts))
    steps = whole[4] if len(whole) > 4 and whole[4] is not None else [1] * len(starts)
    if any(step < 1 for step in steps):
        raise ExportError(f"a Slice with the steps {list(steps)} cannot be tuned")

    def compute(x: Tensor) -> Tensor:
        where = [slice(None)] * x.dim()
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            where[_behind(axis)] = slice(start, end, step)
        return x[tuple(where)]

    return compute


def _concat(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    axis = _behind(attributes["axis"])

    def compute(*tensors: Tensor) -> Tensor:
        samples = max(map(len, tensors))
        return torch.cat([tensor.expand(samples, *tensor.shape[1:]) for tensor in tensors], axis)

    return compute


def _unsqueeze(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    axes = whole[1]
    assert axes is not None

    def compute(x: Tensor) -> Tensor:
        for axis in sorted(axis % (x.dim() - 1 + len(axes)) for axis in axes):
            x = x.unsqueeze(axis + 1)
        return x

    return compute


def _squeeze(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    axes = whole[1]
    assert axes is not None
    return lambda x: x.squeeze([_behind(axis) for axis in axes])


def _expand(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    shape = whole[1]
    assert shape is not None
    return lambda x: x.expand(len(x), *torch.broadcast_shapes(x.shape[1:], tuple(shape)))


def _depth_to_space(attributes: dict[str, Any], whole: _Whole, outputs: int) -> _Made:
    side = attributes["blocksize"]
    if attributes.get("mode", b"DCR") != b"DCR":
        raise ExportError("a DepthToSpace of mode CRD cannot be tuned")

    def compute(x: Tensor) -> Tensor:
        *samples, channels, height, width = x.shape
        parts = x.reshape(-1, side, side, channels // side**2, height, width).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(*samples, channels // side**2, height * side, width * side)

    return compute


_OPS: dict[str, Callable[[dict[str, Any], _Whole, int], _Made]] = {
    "Add": _binary(torch.add), "Sub": _binary(torch.sub), "Mul": _binary(torch.mul), "Div": _binary(torch.div),
    "Max": _binary(torch.maximum), "MatMul": _binary(torch.matmul), "Gemm": _gemm, "Conv": _conv,
    "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm, "Softmax": _softmax, "Gelu": _gelu,
    "Sigmoid": _unary(torch.sigmoid), "Tanh": _unary(torch.tanh), "Relu": _unary(torch.relu),
    "ReduceSum": _reduce(torch.sum), "ReduceMean": _reduce(torch.mean), "Concat": _concat, "Split": _split,
    "Slice": _slice, "Reshape": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze,
    "Expand": _expand, "DepthToSpace": _depth_to_space,
}  # fmt: skip
