"""Where 16 activation bits buy most: measured on the exact CPU reference, op kind by op kind and layer by layer.

Start from 8 bits everywhere but in the last layer. Each candidate alone is given 16 bits, and the noise that leaves the
output is divided by what it costs; in that order they are bought until the target is met. Noise powers of independent
roundings add up, so what one candidate removes hardly depends on the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fbqat_hub.export.calibration import Ranges
from fbqat_hub.export.float_graph import FloatGraph
from fbqat_hub.export.graph_export import Feed
from fbqat_hub.export.parity import sqnr_db
from fbqat_hub.export.precision import VIEW_OPS, Precision, op_kind
from fbqat_hub.export.qdq import insert_qdq
from fbqat_hub.export.reference import exact_session
from fbqat_hub.export.rewrite import static_shapes

#: SQNR of the exact CPU reference to the packed torch model up to which 16 bits are bought.
TARGET_DB = 30.0


@dataclass(frozen=True)
class Candidate:
    """What can be given 16 bits at once.

    Attributes:
        name: a kind of `OP_KINDS`, or a pattern of layer names.
        is_layers: which of the two.
        cost: its share of all activation bytes plus its share of all operations (multiply-accumulates, or elements).
    """

    name: str
    is_layers: bool
    cost: float

    def at_16_bits(self, precision: Precision) -> Precision:
        """`precision` with this candidate at 16 bits."""
        if self.is_layers:
            return replace(precision, a16_layers=(*precision.a16_layers, self.name))
        return replace(precision, a16_ops=(*precision.a16_ops, self.name))


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
    target_db: float = TARGET_DB,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Precision, dict[str, Any]]:
    """The cheapest precision found that reaches `target_db`, and how it was found.

    Args:
        graph, ranges: as `insert_qdq` takes them.
        feeds: a few inputs that are not held out.
        expected: the packed torch model's output for each.
        start: its `a16_layers` are kept; ops start at 8 bits.
        on_step: called with (done, total) after each measurement of a candidate.

    Returns:
        The precision, and a report: `target_db`, `start_db`, `reached_db`, and `candidates`, most noise for the cost
        first: `name`, `cost`, `alone_db` (all else at 8 bits), `bought`, `then_db` (with all bought before it).
    """

    def measured(precision: Precision) -> float:
        session = exact_session(insert_qdq(graph, ranges, precision))
        return sqnr_db(expected, [session.run(None, feed)[0] for feed in feeds])

    precision = replace(start, a16_ops=())
    reached = start_db = measured(precision)
    found = candidates(graph)
    rows = []
    for done, candidate in enumerate(found):
        alone = measured(candidate.at_16_bits(precision))
        removed = 10 ** (-start_db / 10) - 10 ** (-alone / 10)
        rows.append((removed / candidate.cost, alone, candidate))
        if on_step:
            on_step(done + 1, len(found))
    report = []
    for worth, alone, candidate in sorted(rows, key=lambda row: -row[0]):
        row: dict[str, Any] = {"name": candidate.name, "cost": round(candidate.cost, 5), "alone_db": round(alone, 3)}
        row["bought"] = reached < target_db and worth > 0
        if row["bought"]:
            precision = candidate.at_16_bits(precision)
            reached = measured(precision)
            row["then_db"] = round(reached, 3)
        report.append(row)
    return precision, {
        "target_db": target_db,
        "start_db": round(start_db, 3),
        "reached_db": round(reached, 3),
        "candidates": report,
    }
