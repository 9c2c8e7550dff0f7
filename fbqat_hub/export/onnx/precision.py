"""Which op computes at 8 and which at 16 activation bits on the device, and how weights are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.quantization.packed import PackedLayer

if TYPE_CHECKING:
    import onnx

#: Ops that move values without changing them: output and input share one encoding. ReLU is among them because a
#: tensor that only feeds a ReLU is quantized over [0, max] already: the clip of its codes *is* the ReLU. Resize is
#: nearest (an autoencoder's upsampling).
VIEW_OPS = frozenset(
    {"Reshape", "Transpose", "Slice", "Split", "Unsqueeze", "Squeeze", "Flatten", "DepthToSpace", "Expand"}
    | {"Relu", "Resize"}
)

#: What is not a packed layer, by kind. `matmul` is an activation x activation product, whose second operand is always
#: 8 bits wide (the HTP would make it so unasked); `depthwise` a convolution with float weights of its own (W8);
#: `float_layer` any other layer that was left in float (W8); `other` concatenations, sums, maxima.
OP_KINDS = ("norm", "add", "product", "softmax", "activation", "matmul", "depthwise", "float_layer", "other")
_KIND_OF_OP = {
    "LayerNormalization": "norm", "RMSNormalization": "norm", "Add": "add",
    "Sub": "add", "Mul": "product", "Div": "product", "Softmax": "softmax", "Gelu": "activation",
    "Sigmoid": "activation", "Tanh": "activation", "MatMul": "matmul",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Weight storage and activation bits.

    The layers that hold the weights' mass compute at the activation bits they were trained with (8); what lies
    between them costs little and is kept at 16, and so are a few layers that the model's family names.

    Attributes:
        weight_bits: of layers that have 4-bit codes: 4, or 8 to store the same codes one per byte: equal numbers, twice
            the bytes. Layers with codes of 5 to 8 bits are stored one per byte in any case.
        activation_bits: of packed layers trained at A8: 8, or 16 for W4A16 and W8A16.
        a16_layers: fnmatch patterns of layers that compute at A16 though trained at A8. The export of a denoiser puts
            its family's (`Family.a16_layers`) before them.
        a16_ops: kinds of `OP_KINDS` that compute at 16 bits; the others at 8.
    """

    weight_bits: int = 4
    activation_bits: int = 8
    a16_layers: tuple[str, ...] = ()
    a16_ops: tuple[str, ...] = OP_KINDS

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise ExportError(f"weight_bits is {self.weight_bits}; allowed: 4, or 8")
        if self.activation_bits not in (8, 16):
            raise ExportError(f"activation_bits is {self.activation_bits}; allowed: 8, or 16")
        if unknown := set(self.a16_ops) - set(OP_KINDS):
            raise ExportError(f"unknown kinds of ops {sorted(unknown)}; known: {', '.join(OP_KINDS)}")

    def stored_bits(self, layer: PackedLayer) -> int:
        """Bits at which a packed layer's weight is stored: 4 or 8."""
        return 8 if layer.weight_bits > 4 else self.weight_bits

    def layer_bits(self, name: str, layer: PackedLayer | None) -> int:
        """Activation bits at which the layer called `name` computes (float activations, 32, become 16)."""
        if any(fnmatchcase(name, pattern) for pattern in self.a16_layers):
            return 16
        if layer is None:
            return self.op_bits("float_layer")
        return self.activation_bits if layer.activation_bits == 8 else 16

    def op_bits(self, kind: str) -> int:
        """Activation bits of one kind of op."""
        return 16 if kind in self.a16_ops else 8


#: No op has 16 bits that could have 8.
LOWEST = Precision(a16_ops=())

PRESETS = {
    "w4a8": Precision(),
    "w4a16": Precision(activation_bits=16),
    "w8a8": Precision(weight_bits=8),
    "w8a16": Precision(weight_bits=8, activation_bits=16),
}


#: SQNR in dB of the exact CPU reference to the packed torch model that `auto` keeps if nothing else is asked for.
TARGET_DB = 25.0
#: What can be asked for: less does not pass the certificate's gates, more no graph has.
_TARGETS_DB = (15.0, 60.0)
#: What `precision_named` takes.
NAMES = (*PRESETS, "auto")


def precision_named(
    name: str, a16: Sequence[str] = (), target_db: float | None = None
) -> tuple[Precision, float | None]:
    """A preset with further layers at A16, and the SQNR that activation bits are chosen for (None: they are not).

    Args:
        name: one of `NAMES`; "auto" is W4A8 with 8 bits wherever the output keeps the target.
        a16: fnmatch patterns of layer names, e.g. "transformer_blocks.0.*".
        target_db: of "auto", from 15 to 60; `TARGET_DB` if None.

    Raises:
        ExportError: another name, or a target out of range or of another precision than "auto".

    >>> precision_named("w4a16", ["proj_in"])[0].a16_layers
    ('proj_in',)
    """
    if name not in NAMES:
        raise ExportError(f"unknown precision {name!r}; known: {', '.join(NAMES)}")
    if target_db is not None and name != "auto":
        raise ExportError(f"target_db is {target_db:g}, and precision is {name}; a target is for precision auto only")
    least, most = _TARGETS_DB
    if target_db is not None and not least <= target_db <= most:
        raise ExportError(f"target_db is {target_db:g}; allowed: {least:g} to {most:g}")
    preset = PRESETS["w4a8" if name == "auto" else name]
    return replace(preset, a16_layers=tuple(a16)), (target_db or TARGET_DB) if name == "auto" else None


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """ExportError unless each of `patterns` is of a layer of `model` whose activation bits can be chosen."""
    names = [name for name, module in model.named_modules() if _has_bits(module)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join(dict.fromkeys([*names[:2], *names[-1:]]))
            raise ExportError(f"a16 pattern {pattern!r} matches no layer of the model; there are e.g. {examples}")


def _has_bits(module: nn.Module) -> bool:
    """Of a layer that `Precision.layer_bits` is asked for: a matrix product, or a convolution over all channels."""
    return isinstance(module, PackedLayer | nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def op_kind(
    node: onnx.NodeProto, layers: Mapping[str, PackedLayer], constants: Mapping[str, onnx.TensorProto]
) -> str | None:
    """The kind of `node` among `OP_KINDS`; None for a packed layer."""
    if node.op_type in ("Gemm", "Conv") and node.input[1] in constants:
        if node.input[1] in layers:
            return None
        weight = constants[node.input[1]]
        depthwise = node.op_type == "Conv" and weight.dims[1] == 1 and max(weight.dims[2:]) > 1
        return "depthwise" if depthwise else "float_layer"
    return "matmul" if node.op_type == "Gemm" else _KIND_OF_OP.get(node.op_type, "other")


@dataclass(frozen=True)
class NodeBits:
    """Bits of each input (0 = leave as it is) and of the outputs of one node."""

    inputs: Sequence[int]
    output: int


def node_bits(
    node: onnx.NodeProto,
    precision: Precision,
    layers: Mapping[str, PackedLayer],
    module_names: Mapping[str, str],
    constants: Mapping[str, onnx.TensorProto],
) -> NodeBits:
    """The bits at which `node` (not a view op) reads and writes its activations."""
    count, kind = len(node.input), op_kind(node, layers, constants)
    if kind in (None, "float_layer"):
        bits = precision.layer_bits(module_names[node.input[1]], layers.get(node.input[1]))
    else:
        bits = precision.op_bits(kind)
    if kind == "matmul":
        return NodeBits([bits, 8] + [0] * (count - 2), bits)
    return NodeBits([bits] * count, bits)
