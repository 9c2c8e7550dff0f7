"""All four families: the graph is the model, and the true tiny teachers, quantized, run on the HTP emulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from fbqat_hub.export import PRESETS, ExportError, export_htp
from fbqat_hub.export.bundle.pipeline import record_inputs
from fbqat_hub.export.htp.graph import trace_graph
from fbqat_hub.export.onnx.float_graph import as_feed, block_outputs, packed_layers, runnable
from fbqat_hub.export.onnx.wrappers import blocks_of, wrap
from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.teachers import SHIPPED
from tests.conftest import CAPTIONS, call_of

TEACHERS = {"sana": "sana-tiny", "pixart-sigma": "pixart-sigma-tiny", "sd3": "sd3-tiny", "flux": "flux-schnell-tiny"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_the_model_and_its_blocks(family: str, teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """With float activations the packed model is float but for its weights: all agree to float rounding."""
    float_activations = {"activation_bits": 32, "module_overrides": {}}
    folder = convert_pipeline(str(teacher_of(family)), tmp_path / "packed", float_activations)
    pipeline = load_pipeline(folder)
    items = record_inputs(pipeline, CAPTIONS[:1], call_of(family, pipeline))
    layers, wrapper = packed_layers(pipeline.transformer), wrap(pipeline.transformer, items[0])
    graph, _ = trace_graph(wrapper, items[0], layers)
    session = onnxruntime.InferenceSession(runnable(graph).SerializeToString())
    # the timestep's and the rotary positions' are computed before; the HTP refuses Expand
    assert not {"Sin", "Cos", "Expand", "Einsum", "Attention"} & {node.op_type for node in graph.model.graph.node}
    blocks = blocks_of(pipeline.transformer)
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
    wrapper = wrap(pipeline.transformer, item)
    with pytest.raises(ExportError, match="img_ids differ"):
        wrapper.host_inputs(item | {"img_ids": item["img_ids"] + 1})


#: Lowest SQNR in dB of the emulator against torch, W4A8 without training; measured 22 to 28 on trained codes.
LOWEST = {"sana": 15, "pixart-sigma": 18, "sd3": 18, "flux": 15}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w4a8", "w8a16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_emulator_computes_the_tiny_teacher(family: str, preset: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    packed = convert_pipeline(f"fbqat-hub/{TEACHERS[family]}-openmoji", tmp_path / "packed")
    assert f"fbqat-hub/{TEACHERS[family]}-openmoji" in SHIPPED
    pipeline = load_pipeline(packed)
    call: dict[str, Any] = call_of(family, pipeline) | {"height": 64, "width": 64, "num_inference_steps": 4}
    items = record_inputs(pipeline, ["red heart", "pouting cat", "hot face"], call)
    result = export_htp(
        pipeline.transformer, items[:-2], items[-2:], tmp_path / "out", precision=PRESETS[preset], progress=False
    )
    weights = result["audit"]["qdq"]["weights_by_type"]
    assert weights.get("int4", 0) == (result["model"]["packed_layers"] if preset == "w4a8" else 0)
    assert result["parity"]["emulator_vs_torch_packed"]["sqnr_db"] > LOWEST[family]
    assert len(result["blocks"]) >= len(blocks_of(pipeline.transformer))
