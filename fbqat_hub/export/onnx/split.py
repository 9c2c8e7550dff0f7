"""One graph as several along block boundaries, for models whose constants do not fit into one context (2 GiB).

    graph inputs --> [ blocks 0 .. k ] --> tensors at the cut --> [ blocks k+1 .. ] --> output

A part's inputs are graph inputs and what earlier parts made, by name; the parts run in order. A tensor at a cut leaves
one part and enters the next as float32, with the same encoding on both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import helper

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.float_graph import FloatGraph
from fbqat_hub.families.graph import block_of, blocks_of_outputs


def split_graph(graph: FloatGraph, parts: int) -> list[FloatGraph]:
    """`graph` (rewritten) cut behind every (number of blocks / `parts`)-th block.

    Raises:
        ExportError: fewer blocks than parts.
    """
    blocks = blocks_of_outputs(graph.block_outputs)
    if not 1 <= parts <= len(blocks):
        raise ExportError(
            f"{parts} graphs were asked for; the model has {len(blocks)} blocks, so give 1 to {len(blocks)}"
        )
    nodes = list(graph.model.graph.node)
    last = [blocks[len(blocks) * (part + 1) // parts - 1] for part in range(parts - 1)]
    cuts = [
        1 + max(place for place, node in enumerate(nodes) if any(block_of(name) == block for name in node.output))
        for block in last
    ]
    edges = [0, *cuts, len(nodes)]
    return [_part(graph, nodes, start, end) for start, end in itertools.pairwise(edges)]


def _part(graph: FloatGraph, nodes: list[onnx.NodeProto], start: int, end: int) -> FloatGraph:
    """Nodes `start` to `end` as a graph of their own."""
    whole = graph.model.graph
    inside = nodes[start:end]
    constants = {item.name: item for item in whole.initializer}
    described = {value.name: value for value in [*whole.value_info, *whole.input, *whole.output]}
    made = {name for node in inside for name in node.output}
    read = dict.fromkeys(name for node in inside for name in node.input if name)
    read_later = {name for node in nodes[end:] for name in node.input} | {value.name for value in whole.output}
    outputs = [name for node in inside for name in node.output if name in read_later]
    # a block's own output first: it is the one that is compared
    outputs.sort(key=lambda name: name not in graph.block_outputs)
    model = helper.make_model(
        helper.make_graph(
            inside,
            whole.name,
            [described[name] for name in read if name not in made and name not in constants],
            [described[name] for name in outputs],
            [constants[name] for name in read if name in constants],
            value_info=[value for name, value in described.items() if name in made and name not in outputs],
        ),
        opset_imports=list(graph.model.opset_import),
    )
    model.ir_version = graph.model.ir_version
    return FloatGraph(
        model=model,
        layers={name: layer for name, layer in graph.layers.items() if name in read},
        module_names={name: module for name, module in graph.module_names.items() if name in read},
        block_outputs=tuple(name for name in graph.block_outputs if name in made),
    )


def describe_chain(graphs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The order of the graphs, and where each input comes from.

    Args:
        graphs: name -> `inputs` and `outputs`, a record each with the tensor's `name`, in order.

    Returns:
        One record a graph: `graph`, its name, and `reads`, input -> the graph that made it, or "host".
    """
    made: dict[str, str] = {}
    chain = []
    for name, tensors in graphs.items():
        reads = {tensor["name"]: made.get(tensor["name"], "host") for tensor in tensors["inputs"]}
        chain.append({"graph": name, "reads": reads})
        made.update({tensor["name"]: name for tensor in tensors["outputs"]})
    return chain
