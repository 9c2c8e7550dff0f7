"""The ops of a QDQ graph in torch, on tensors that have one dimension more than in the graph, in front: samples.

A constant has 1 there. An axis of the graph is counted from behind that dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor

from fbqat_hub.export.errors import ExportError


class TorchOp:
    """One node: what it computes of its tensors; integer constants (shapes, axes) are read once.

    Attributes:
        tensors: names of the inputs that are tensors.
    """

    def __init__(self, tensors: list[str], compute: Callable[..., Any]) -> None:
        self.tensors, self._compute = tensors, compute

    def __call__(self, *tensors: Tensor) -> Any:
        return self._compute(*tensors)


def torch_op(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> TorchOp:
    """What `node` computes, in torch.

    Args:
        constants: the graph's, by name. Those that `node` reads itself are of integers: shapes, axes, places.

    Raises:
        ExportError: an op, or a form of one, that is not known here.
    """
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
    return TorchOp(tensors, _OPS[node.op_type](attributes, whole, len(node.output)))


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
