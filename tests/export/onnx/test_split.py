"""A model in several graphs computes what it computes in one."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from fbqat_hub.export import ExportError
from fbqat_hub.export.onnx.float_graph import Feed, FloatGraph, as_feed, packed_layers, runnable
from fbqat_hub.export.onnx.rewrite import traced
from fbqat_hub.export.onnx.split import describe_chain, split_graph
from fbqat_hub.families import get_family
from tests.export.conftest import float_sana, make_items, pack


@pytest.fixture(scope="module")
def three_blocks() -> tuple[FloatGraph, Feed]:
    model = pack(float_sana(blocks=3))
    item = make_items(1, seed=3)[0]
    wrapper = get_family("sana").graph(model, item)
    return traced(wrapper, item, packed_layers(model))[0], as_feed(wrapper.host_inputs(item))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_parts_in_order_are_the_whole(parts: int, three_blocks: tuple[FloatGraph, Feed]) -> None:
    graph, feed = three_blocks
    values = dict(feed)
    found = split_graph(graph, parts)
    for part in found:
        session = onnxruntime.InferenceSession(runnable(part).SerializeToString())
        names = [value.name for value in part.model.graph.output]
        given = {value.name: values[value.name] for value in part.model.graph.input}
        values.update(zip(names, session.run(None, given), strict=True))
    whole = onnxruntime.InferenceSession(runnable(graph).SerializeToString()).run(None, feed)[0]
    np.testing.assert_allclose(values["sample"], whole, atol=1e-5)
    assert len(found) == parts
    assert sum(len(part.layers) for part in found) == len(graph.layers)
    assert sum(len(part.model.graph.node) for part in found) == len(graph.model.graph.node)


def test_more_graphs_than_blocks_are_refused(three_blocks: tuple[FloatGraph, Feed]) -> None:
    with pytest.raises(ExportError, match="4 graphs were asked for; the model has 3 blocks"):
        split_graph(three_blocks[0], 4)


def test_the_chain_says_where_each_input_comes_from() -> None:
    def tensors(inputs: list[str], outputs: list[str]) -> dict[str, list[dict[str, str]]]:
        return {"inputs": [{"name": name} for name in inputs], "outputs": [{"name": name} for name in outputs]}

    graphs = {
        "a": tensors(["latents", "time"], ["x", "y"]),
        "b": tensors(["x", "time"], ["z"]),
        "c": tensors(["y", "z"], ["sample"]),
    }
    assert describe_chain(graphs) == [
        {"graph": "a", "reads": {"latents": "host", "time": "host"}},
        {"graph": "b", "reads": {"x": "a", "time": "host"}},
        {"graph": "c", "reads": {"y": "a", "z": "b"}},
    ]
