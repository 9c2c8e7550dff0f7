"""Every family: the graph is the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fbqat_hub.export.bundle.pipeline import record_inputs
from fbqat_hub.export.onnx.float_graph import as_feed, packed_layers, runnable
from fbqat_hub.export.onnx.rewrite import traced
from fbqat_hub.families import FAMILIES, get_family
from fbqat_hub.families.graph import block_outputs
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import CAPTIONS, call_of, most_families


@pytest.mark.parametrize("family", most_families(lambda family: not family.without_graph))
def test_the_graph_is_the_model_and_its_blocks(family: str, teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """With float activations the packed model is float but for its weights: all agree to float rounding."""
    float_activations = {"activation_bits": 32, "module_overrides": {}}
    folder = convert_pipeline(str(teacher_of(family)), tmp_path / "packed", float_activations)
    pipeline = load_pipeline(folder)
    items = record_inputs(pipeline, CAPTIONS[:1], call_of(family, pipeline))
    layers, wrapper = packed_layers(pipeline.transformer), FAMILIES[family].graph(pipeline.transformer, items[0])
    graph, _ = traced(wrapper, items[0], layers)
    session = onnxruntime.InferenceSession(runnable(graph).SerializeToString())
    # the timestep's and the rotary positions' are computed before; the HTP refuses Expand
    assert not {"Sin", "Cos", "Expand", "Einsum", "Attention"} & {node.op_type for node in graph.model.graph.node}
    blocks = FAMILIES[family].blocks(pipeline.transformer)
    with torch.no_grad(), block_outputs(pipeline.transformer, blocks) as found:
        expected = pipeline.transformer(**items[-1], return_dict=False)[0].numpy()
    assert {name.partition("/")[0] for name in graph.block_outputs} == set(blocks)
    assert set(graph.block_outputs) <= set(found)
    output = session.run(None, as_feed(wrapper.host_inputs(items[-1])))[0]
    np.testing.assert_allclose(output, expected, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


def test_flux_refuses_other_positions(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """They are constants of the graph: an item of another picture size would silently be turned wrongly."""
    pipeline = load_pipeline(convert_pipeline(str(teacher_of("flux")), tmp_path / "packed"))
    item = record_inputs(pipeline, CAPTIONS[:1], call_of("flux", pipeline))[0]
    wrapper = get_family("flux").graph(pipeline.transformer, item)
    with pytest.raises(ValueError, match="img_ids differ"):
        wrapper.host_inputs(item | {"img_ids": item["img_ids"] + 1})
