"""Rewrites of a float ONNX graph that the HTP needs: ops it lacks, and ops it runs but gets wrong.

Each function changes the model in place and returns how many places it changed. They are independent; `rewrite`
runs all of them and refreshes the shapes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.float_graph import FloatGraph, trace
from fbqat_hub.families.graph import GraphWrapper, Item
from fbqat_hub.quantization.packed import PackedLayer

#: Ops no rewrite cures, with the reason they must not reach the compiler.
FORBIDDEN = {
    "Attention": "runs in float inside the HTP graph without a word: use the explicit attention processors",
    "Erf": "is not supported: export Gelu as one op",
    "Einsum": "is not supported: use Reshape, Transpose and DepthToSpace",
    "InstanceNormalization": "runs in float inside the HTP graph without a word: use LayerNormalization",
    "Reciprocal": "is quantized with its input's scale and silently wrong: use Div(1, x)",
}


def static_shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shape of every tensor the model states one for (inputs, outputs, value_info, initializers)."""
    graph = model.graph
    shapes = {
        value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.input, *graph.output]
    }
    shapes.update({item.name: list(item.dims) for item in graph.initializer})
    return shapes


def _consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    uses: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            uses[name].append(node)
    return uses


def _replace(graph: onnx.GraphProto, old: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
    """Put `new` where the last of `old` stood (everything `new` reads is made before that point)."""
    gone = {item.output[0] for item in old}  # by name: every replacement copies the nodes
    position = max(index for index, node in enumerate(graph.node) if node.output[0] in gone)
    nodes = list(graph.node)
    kept = [node for node in nodes[: position + 1] if node.output[0] not in gone] + new + nodes[position + 1 :]
    del graph.node[:]
    graph.node.extend(kept)


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def fold_constants(model: onnx.ModelProto) -> int:
    """Compute nodes that read nothing but constants: torch's exporter leaves those of more than a few thousand numbers.

    FLUX's rotary tables at true width are such. Weights without data (`float_graph.FloatGraph`) are no constants here.
    """
    graph, folded = model.graph, 0
    constants = {item.name: item for item in graph.initializer if item.HasField("raw_data")}
    for node in list(graph.node):
        if not node.input or any(name not in constants for name in node.input if name):
            continue
        given = {name: numpy_helper.to_array(constants[name]) for name in node.input if name}
        for name, value in zip(node.output, ReferenceEvaluator(node).run(None, given), strict=True):
            constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
            graph.initializer.append(constants[name])
        graph.node.remove(node)
        folded += 1
    return folded


def reciprocal_to_div(model: onnx.ModelProto) -> int:
    """Reciprocal(x) -> Div(1, x). The HTP quantizes Reciprocal's 1.0 with x's scale: wrong wherever max(x) < 1."""
    graph = model.graph
    found = [node for node in graph.node if node.op_type == "Reciprocal"]
    for node in found:
        one = _constant(graph, f"{node.output[0]}/one", np.array(1.0, np.float32))
        _replace(graph, [node], [helper.make_node("Div", [one, node.input[0]], list(node.output), name=node.name)])
    return len(found)


def drop_same_shape(model: onnx.ModelProto) -> int:
    """Remove Squeeze, Expand and Reshape nodes that change no shape (some exporters leave invalid ones)."""
    graph, shapes, removed = model.graph, static_shapes(model), 0
    for node in list(graph.node):
        same = shapes.get(node.input[0]) is not None and shapes.get(node.input[0]) == shapes.get(node.output[0])
        if node.op_type in ("Squeeze", "Expand", "Reshape") and same and _bypass(graph, node, node.input[0]):
            removed += 1
    return removed


def drop_zero_bias(model: onnx.ModelProto) -> int:
    """Remove additions of a constant that is all 0: behind an RMSNormalization the HTP gets it wrong by a fifth."""
    graph, shapes, removed = model.graph, static_shapes(model), 0
    constants = {item.name: item for item in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Add"]:
        zeros = [name for name in node.input if name in constants and not numpy_helper.to_array(constants[name]).any()]
        if len(zeros) != 1:
            continue
        kept = next(name for name in node.input if name != zeros[0])
        if shapes.get(kept) == shapes.get(node.output[0]) and _bypass(graph, node, kept):
            removed += 1
    return removed


def layer_norm_bias_to_add(model: onnx.ModelProto) -> int:
    """LayerNormalization(x, scale, bias) -> Add(LayerNormalization(x, scale), bias): with a bias it runs in float."""
    graph = model.graph
    found = [node for node in graph.node if node.op_type == "LayerNormalization" and len(node.input) == 3]
    for node in found:
        (source, scale, bias), name = node.input, node.output[0]
        norm = onnx.NodeProto()
        norm.CopyFrom(node)
        norm.input[:], norm.output[:] = [source, scale], [f"{name}/normed"]
        added = helper.make_node("Add", [f"{name}/normed", bias], [name], name=f"{node.name}/bias")
        _replace(graph, [node], [norm, added])
    return len(found)


def _bypass(graph: onnx.GraphProto, node: onnx.NodeProto, source: str) -> bool:
    """Let the readers of `node` read `source`, and remove it; not where it makes an output of the graph."""
    if any(value.name == node.output[0] for value in graph.output):
        return False
    for user in graph.node:
        for index, name in enumerate(user.input):
            if name == node.output[0]:
                user.input[index] = source
    graph.node.remove(node)
    return True


def unpatchify(model: onnx.ModelProto) -> int:
    """[N,h,w,p,p,C] -> Transpose(0,5,1,3,2,4) or Einsum nhwpqc->nchpwq -> [N,C,h*p,w*p], written without 6-D tensors.

    Becomes Reshape [N,h,w,p*p*C] -> Transpose NCHW -> DepthToSpace(DCR, blocksize p); no DepthToSpace for p = 1.
    """
    graph, shapes, changed = model.graph, static_shapes(model), 0
    producer = {name: node for node in graph.node for name in node.output}
    uses = _consumers(graph)
    for node in list(graph.node):
        permuted = node.op_type == "Transpose" and list(helper.get_node_attr_value(node, "perm")) == [0, 5, 1, 3, 2, 4]
        summed = node.op_type == "Einsum" and helper.get_node_attr_value(node, "equation") == b"nhwpqc->nchpwq"
        if not (permuted or summed):
            continue
        before, after = producer[node.input[0]], uses[node.output[0]][0]
        if before.op_type != "Reshape" or after.op_type != "Reshape" or len(uses[node.output[0]]) != 1:
            continue
        batch, height, width, patch, _, channels = shapes[before.output[0]]
        name, output = node.output[0], after.output[0]
        shape = np.array([batch, height, width, patch * patch * channels], np.int64)
        nhwc = helper.make_node(
            "Reshape",
            [before.input[0], _constant(graph, f"{name}/nhwc_shape", shape)],
            [f"{name}/nhwc"],
            name=f"{name}/nhwc",
        )
        nchw = helper.make_node(
            "Transpose",
            [f"{name}/nhwc"],
            [f"{name}/nchw" if patch > 1 else output],
            name=f"{name}/nchw",
            perm=[0, 3, 1, 2],
        )
        made = [nhwc, nchw]
        if patch > 1:
            made.append(
                helper.make_node(
                    "DepthToSpace",
                    [f"{name}/nchw"],
                    [output],
                    name=f"{name}/depth_to_space",
                    blocksize=patch,
                    mode="DCR",
                )
            )
        _replace(graph, [before, node, after], made)
        changed += 1
    return changed


def group_norm_to_layer_norm(model: onnx.ModelProto) -> int:
    """GroupNormalization, which the HTP does not take, as LayerNormalization of [N, groups, C / groups * pixels].

    The scale and bias of each channel follow as a product and a sum.
    """
    graph, shapes = model.graph, static_shapes(model)
    found = [node for node in graph.node if node.op_type == "GroupNormalization"]
    for node in found:
        (source, scale, bias), name = node.input, node.output[0]
        batch, channels, *pixels = shapes[source]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        groups = attributes["num_groups"]
        size = channels // groups * math.prod(pixels)
        grouped = np.array([batch, groups, size], np.int64)
        steps = [
            ("Reshape", [source, _constant(graph, f"{name}/grouped_shape", grouped)], {}),
            (
                "LayerNormalization",
                [f"{name}/0", _constant(graph, f"{name}/ones", np.ones(size, np.float32))],
                {"axis": -1, "epsilon": attributes.get("epsilon", 1e-5)},
            ),
            ("Reshape", [f"{name}/1", _constant(graph, f"{name}/shape", np.array(shapes[source], np.int64))], {}),
            ("Mul", [f"{name}/2", _per_channel(graph, scale, len(pixels))], {}),
            ("Add", [f"{name}/3", _per_channel(graph, bias, len(pixels))], {}),
        ]
        outputs = [f"{name}/{index}" for index in range(len(steps) - 1)] + [name]
        _replace(
            graph,
            [node],
            [
                helper.make_node(op, inputs, [output], name=f"{node.name}/{op}_{index}", **options)
                for index, ((op, inputs, options), output) in enumerate(zip(steps, outputs, strict=True))
            ],
        )
    return len(found)


def _per_channel(graph: onnx.GraphProto, name: str, sides: int) -> str:
    """The constant [C] called `name` as [1, C, 1, 1], with a 1 for each of so many sides of a picture."""
    value = next(numpy_helper.to_array(item) for item in graph.initializer if item.name == name)
    return _constant(graph, f"{name}/per_channel_{sides}", value.reshape(1, -1, *[1] * sides))


def silu_of_8_rows_to_1_row(model: onnx.ModelProto) -> int:
    """x * Sigmoid(x) of [N, C, 8, W] computed as [N, C, 1, 8 * W]: the HTP is wrong with 8 rows at 16 bits.

    Not with every width and number of channels (docs/htp.md); with 1 row it is right for all, at no cost.
    """
    graph, shapes, uses = model.graph, static_shapes(model), _consumers(model.graph)
    gates = {node.output[0]: node for node in graph.node if node.op_type == "Sigmoid"}
    changed = 0
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        name, shape = node.output[0], shapes.get(node.output[0], [])
        sigmoid = next((gates[each] for each in node.input if each in gates and len(uses[each]) == 1), None)
        if sigmoid is None or sigmoid.input[0] not in node.input or len(shape) != 4 or shape[2] != 8:
            continue
        row = _constant(graph, f"{name}/row_shape", np.array([*shape[:2], 1, 8 * shape[3]], np.int64))
        picture = _constant(graph, f"{name}/picture_shape", np.array(shape, np.int64))
        steps = [
            ("Reshape", [sigmoid.input[0], row], f"{name}/row"),
            ("Sigmoid", [f"{name}/row"], f"{name}/gate"),
            ("Mul", [f"{name}/row", f"{name}/gate"], f"{name}/product"),
            ("Reshape", [f"{name}/product", picture], name),
        ]
        made = [helper.make_node(op, inputs, [output], name=f"{output}/{op}") for op, inputs, output in steps]
        _replace(graph, [sigmoid, node], made)
        changed += 1
    return changed


def resize_to_sizes(model: onnx.ModelProto) -> int:
    """Nearest Resize by float factors -> by whole sizes: a factor would be quantized like an activation."""
    shapes, changed = static_shapes(model), 0
    for node in model.graph.node:
        if node.op_type == "Resize" and len(node.input) == 3:
            sizes = np.array(shapes[node.output[0]], np.int64)
            size = _constant(model.graph, f"{node.output[0]}/size", sizes)
            node.input[:] = [node.input[0], "", "", size]
            changed += 1
    return changed


def rewrite(model: onnx.ModelProto) -> dict[str, int]:
    """All rewrites, then fresh shapes; returns how many places each changed.

    Raises:
        ExportError: an op of `FORBIDDEN` is still there.
    """
    steps = (
        fold_constants,
        reciprocal_to_div,
        unpatchify,
        drop_same_shape,
        layer_norm_bias_to_add,
        drop_zero_bias,
        group_norm_to_layer_norm,
        silu_of_8_rows_to_1_row,
        resize_to_sizes,
    )
    counts = {step.__name__: step(model) for step in steps}
    for node in model.graph.node:
        if node.op_type in FORBIDDEN:
            raise ExportError(f"ONNX op {node.op_type} ({node.name or node.output[0]}) {FORBIDDEN[node.op_type]}")
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True)
    made = {name for node in model.graph.node for name in node.output}
    del model.graph.value_info[:]
    model.graph.value_info.extend(value for value in inferred.graph.value_info if value.name in made)
    return counts


def traced(
    wrapper: GraphWrapper, example: Item, layers: Mapping[str, PackedLayer]
) -> tuple[FloatGraph, dict[str, int]]:
    """The float graph of `wrapper` after all rewrites, and how many places each changed (`trace`, `rewrite`)."""
    graph = trace(wrapper, example, layers)
    return graph, rewrite(graph.model)
