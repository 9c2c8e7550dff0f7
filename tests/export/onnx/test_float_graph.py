"""The float twin computes what the packed model computes, and the packed model stays as it is."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from fbqat_hub.export import ExportError
from fbqat_hub.export.onnx.float_graph import as_feed, packed_layers, runnable, trace
from fbqat_hub.export.onnx.rewrite import rewrite
from fbqat_hub.families import get_family
from fbqat_hub.families.graph import MASK_BIAS
from fbqat_hub.quantization import (
    ActivationScheme,
    PackedLayer,
    WeightScheme,
    convert,
    prepare,
    set_bit_width,
)
from tests.export.conftest import float_sana, make_items, pack


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_float_graph_is_the_model_with_its_mask(patch_size: int) -> None:
    """At 32 activation bits the packed model is float but for its weights: both agree to float rounding.

    diffusers masks with -10000, the graph with -30: exp(-30) = 1e-13 is under float32's rounding.
    """
    model = pack(float_sana(patch_size=patch_size), activation_range="per_token", overrides={"*": {"bits": 32}})
    items = make_items(3, seed=5)
    wrapper = get_family("sana").graph(model, items[0])
    graph = trace(wrapper, items[0], packed_layers(model))
    rewrite(graph.model)
    session = onnxruntime.InferenceSession(runnable(graph).SerializeToString())
    for item in items:
        feed = as_feed(wrapper.host_inputs(item))
        assert set(np.unique(feed["encoder_attention_bias"])) <= {MASK_BIAS, 0.0}
        with torch.no_grad():
            expected = model(**item, return_dict=False)[0].numpy()
        np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=2e-5)
        unmasked = feed | {"encoder_attention_bias": np.zeros_like(feed["encoder_attention_bias"])}
        if item["encoder_attention_mask"].min() == 0:
            assert np.abs(session.run(None, unmasked)[0] - expected).max() > 1e-3


def test_linear_layers_are_one_gemm_each(packed_sana: nn.Module) -> None:
    """MatMul + Add would cost a requantization between them."""
    graph = trace(
        get_family("sana").graph(packed_sana, make_items(1, 0)[0]), make_items(1, 0)[0], packed_layers(packed_sana)
    ).model.graph
    weights = {item.name for item in graph.initializer if item.name.endswith(".weight")}
    readers = {node.op_type for node in graph.node if weights & set(node.input) and "norm" not in str(node.input)}
    assert readers == {"Gemm", "Conv"}


def test_without_a_text_mask_the_graph_has_no_bias_input(packed_sana: nn.Module) -> None:
    item = {name: tensor for name, tensor in make_items(1, 0)[0].items() if name != "encoder_attention_mask"}
    graph = trace(get_family("sana").graph(packed_sana, item), item, packed_layers(packed_sana)).model.graph
    assert [value.name for value in graph.input] == ["hidden_states", "encoder_hidden_states", "timestep_embedding"]


def test_the_packed_model_is_not_changed(packed_sana: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in packed_sana.state_dict().items()}
    processors = dict(packed_sana.attn_processors)
    get_family("sana").graph(packed_sana, make_items(1, 0)[0])
    assert packed_sana.attn_processors == processors
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed_sana.state_dict().items())
    assert sum(isinstance(module, PackedLayer) for module in packed_sana.modules()) == 17


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ExportError, match="no packed layer"):
        packed_layers(float_sana())


def test_group_scales_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    prepare(model, WeightScheme(granularity="per_group", group_size=32), ActivationScheme())
    set_bit_width(model, 4)
    convert(model)
    with pytest.raises(ExportError, match=r"'0' has per-group weight scales \(8, 2\)"):
        packed_layers(model)
