"""Where 8 activation bits are enough: measured on the exact CPU reference, op kind by op kind and layer by layer.

Start from 16 bits everywhere. Each candidate alone is given 8 bits, and the noise that appears in the output is divided
by what the 8 bits save. In that order candidates are lowered as far as the target allows. Noise powers of independent
roundings add up on a clean background; the other way round, from 8 bits up, a layer's 16 bits show nothing while the
op before it still rounds to 8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.calibration import Ranges
from fbqat_hub.export.onnx.float_graph import Feed, FloatGraph
from fbqat_hub.export.onnx.precision import TARGET_DB, VIEW_OPS, Precision, op_kind
from fbqat_hub.export.onnx.qdq import insert_qdq
from fbqat_hub.export.onnx.reference import exact_session
from fbqat_hub.export.onnx.rewrite import static_shapes
from fbqat_hub.quantization.convert import matches


@dataclass(frozen=True)
class Candidate:
    """What can be given 8 bits at once.

    Attributes:
        name: a kind of `OP_KINDS`, or a pattern of layer names.
        is_layers: which of the two.
        cost: its share of all activation bytes plus its share of all operations (multiply-accumulates, or elements).
    """

    name: str
    is_layers: bool
    cost: float


def layer_pattern(name: str) -> str:
    """The pattern of a layer and its like in the other blocks.

    >>> layer_pattern("transformer_blocks.3.attn1.to_out.0")
    'transformer_blocks.*.attn1.to_out.*'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def candidates(graph: FloatGraph) -> list[Candidate]:
    """Every kind of op and every group of like packed layers in the graph, with its cost."""
    nodes, shapes = graph.model.graph.node, static_shapes(graph.model)
    constants = {item.name: item for item in graph.model.graph.initializer}
    moved: dict[tuple[str, bool], int] = {}
    worked: dict[tuple[str, bool], int] = {}
    for node in nodes:
        if node.op_type in VIEW_OPS or not node.input:
            continue
        kind = op_kind(node, graph.layers, constants)
        key = (kind, False) if kind is not None else (layer_pattern(graph.module_names[node.input[1]]), True)
        made = int(np.prod(shapes[node.output[0]]))
        inner = int(np.prod(shapes[node.input[1]][1:])) if node.op_type in ("Gemm", "Conv") else 1
        if node.op_type == "MatMul":
            inner = shapes[node.input[1]][-2]
        read = sum(int(np.prod(shapes[name])) for name in node.input if name not in constants)
        moved[key] = moved.get(key, 0) + made + read
        worked[key] = worked.get(key, 0) + made * inner
    bytes_of_all, work_of_all = sum(moved.values()), sum(worked.values())
    return [
        Candidate(name, is_layers, moved[name, is_layers] / bytes_of_all + worked[name, is_layers] / work_of_all)
        for name, is_layers in moved
    ]


def allocate(
    graph: FloatGraph,
    ranges: Ranges,
    feeds: Sequence[Feed],
    expected: Sequence[np.ndarray],
    *,
    start: Precision,
    clipped: Ranges | None = None,
    target_db: float = TARGET_DB,
) -> tuple[Precision, dict[str, Any]]:
    """The cheapest precision found that keeps `target_db`, and how it was found.

    Args:
        graph, ranges, clipped: as `insert_qdq` takes them.
        feeds: a few inputs, other than those that set the ranges and than the held-out ones.
        expected: the packed torch model's output for each.
        start: its weight storage, and its `a16_layers`, are kept.

    Returns:
        The precision, and a report: `target_db`, `all_at_16_db`, `reached_db`, `share_at_16` (of the cost of all
        candidates), and `candidates`, most noise for the cost first: `name`, `cost`, `alone_db` (the SQNR with 8 bits
        there and 16 elsewhere), `bits`. Where even 16 bits everywhere miss `TARGET_DB`, nothing is lowered.

    Raises:
        ExportError: another target, which even 16 bits everywhere miss.
    """

    def with_low(low: Sequence[Candidate]) -> Precision:
        names = {candidate.name for candidate in low}
        layers = [each.name for each in found if each.is_layers and each.name not in names]
        ops = tuple(each.name for each in found if not each.is_layers and each.name not in names)
        return replace(start, activation_bits=8, a16_layers=(*start.a16_layers, *layers), a16_ops=ops)

    def measured(low: Sequence[Candidate]) -> float:
        session = exact_session(insert_qdq(graph, ranges, with_low(low), clipped=clipped))
        return sqnr_db(expected, [session.run(None, feed)[0] for feed in feeds])

    found = [each for each in candidates(graph) if not (each.is_layers and matches(each.name, start.a16_layers))]
    ceiling = measured([])
    if ceiling < target_db and target_db != TARGET_DB:
        raise ExportError(
            f"target_db is {target_db:g}, and with 16 bits everywhere the output keeps {ceiling:.1f} dB; ask for less, "
            "or take precision w4a16"
        )
    alone = {candidate: measured([candidate]) for candidate in found}
    order = sorted(found, key=lambda each: (10 ** (-alone[each] / 10) - 10 ** (-ceiling / 10)) / each.cost)
    # The noise grows with the number lowered: the most that keep the target, by bisection.
    least, most, reached = 0, len(order), ceiling
    while least < most:
        middle = (least + most + 1) // 2
        value = measured(order[:middle])
        if value >= target_db:
            least, reached = middle, value
        else:
            most = middle - 1
    low = order[:least]
    return with_low(low), {
        "target_db": target_db,
        "all_at_16_db": round(ceiling, 3),
        "reached_db": round(reached, 3),
        "share_at_16": round(1 - sum(each.cost for each in low) / sum(each.cost for each in found), 4),
        "candidates": [
            {
                "name": candidate.name,
                "cost": round(candidate.cost, 5),
                "alone_db": round(alone[candidate], 3),
                "bits": 8 if candidate in low else 16,
            }
            for candidate in reversed(order)
        ],
    }
