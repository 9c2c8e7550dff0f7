"""Which op computes at 8 and which at 16 activation bits on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fbqat_hub.quantization.linear import PackedLinear

if TYPE_CHECKING:
    import onnx

#: Ops that move values without changing them: output and input share one encoding. ReLU is among them because a
#: tensor that only feeds a ReLU is quantized over [0, max] already: the clip of its codes *is* the ReLU.
VIEW_OPS = frozenset(
    {"Reshape", "Transpose", "Slice", "Split", "Unsqueeze", "Squeeze", "Flatten", "DepthToSpace", "Expand", "Relu"}
)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Activation bits by kind of op.

    The layers that hold the weights' mass compute at the activation bits they were trained with (8); what lies
    between them costs little and is kept at 16, and so are a few layers named here.

    Attributes:
        a16_layers: fnmatch patterns of packed layers that compute W4A16 though trained at A8. The last layer, as
            in arXiv 2510.14823; and the timestep's path, one row of a matrix product.
        matmul_first: bits of the first operand and the result of an activation x activation product. The second
            is always 8: the HTP would make it so unasked.
        elementwise: bits of adds, products, norms, softmax, activation functions.
        depthwise: bits of convolutions with their own float weights (W8). At 16 they raise a trained tiny Sana by
            1-2 dB for under 2% of its products (3 x 3 against some 2,500 a value in the layers around them).
        float_linear: bits of layers that were left in float (W8 on the device).
    """

    a16_layers: tuple[str, ...] = ("proj_out", "time_embed.*")
    matmul_first: int = 16
    elementwise: int = 16
    depthwise: int = 16
    float_linear: int = 16

    def layer_bits(self, name: str, layer: PackedLinear | None) -> int:
        """Activation bits at which the linear layer called `name` computes (float activations, 32, become 16)."""
        if layer is None:
            return self.float_linear
        if layer.activation_bits != 8 or any(fnmatchcase(name, pattern) for pattern in self.a16_layers):
            return 16
        return 8


@dataclass(frozen=True)
class NodeBits:
    """Bits of each input (0 = leave as it is) and of the outputs of one node."""

    inputs: Sequence[int]
    output: int


def node_bits(
    node: onnx.NodeProto,
    precision: Precision,
    layers: Mapping[str, PackedLinear],
    module_names: Mapping[str, str],
    constants: Mapping[str, onnx.TensorProto],
) -> NodeBits:
    """The bits at which `node` (not a view op) reads and writes its activations."""
    count = len(node.input)
    if node.op_type in ("Gemm", "Conv") and node.input[1] in constants:
        weight = constants[node.input[1]]
        if node.op_type == "Conv" and node.input[1] not in layers and weight.dims[1] == 1 and max(weight.dims[2:]) > 1:
            bits = precision.depthwise
        else:
            bits = precision.layer_bits(module_names[node.input[1]], layers.get(node.input[1]))
        return NodeBits([bits] * count, bits)
    if node.op_type in ("MatMul", "Gemm"):
        return NodeBits([precision.matmul_first, 8] + [0] * (count - 2), precision.matmul_first)
    return NodeBits([precision.elementwise] * count, precision.elementwise)
