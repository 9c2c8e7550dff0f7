"""Automatic A16: what keeps 16 bits is worth its cost, and the target holds on other inputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.allocation import allocate, candidates
from fbqat_hub.export.onnx.calibration import Ranges, calibrate
from fbqat_hub.export.onnx.float_graph import FloatGraph, as_feed, packed_layers, runnable
from fbqat_hub.export.onnx.items import torch_outputs
from fbqat_hub.export.onnx.precision import OP_KINDS, PRESETS
from fbqat_hub.export.onnx.qdq import insert_qdq
from fbqat_hub.export.onnx.reference import exact_session
from fbqat_hub.export.onnx.rewrite import traced
from fbqat_hub.families import get_family
from tests.export.conftest import Item, float_sana, make_items, pack

START = replace(PRESETS["w4a8"], a16_layers=get_family("sana").a16_layers)


@pytest.fixture(scope="module")
def outlier_sana() -> tuple[nn.Module, FloatGraph, Ranges, Any]:
    """A Sana whose one layer has outliers: its input spans a hundred times what most of its values need.

    What it is compared with has the same codes and float activations, so that nothing but the graph's rounding counts.
    """
    model = float_sana()
    with torch.no_grad():
        block = model.transformer_blocks[0]
        block.ff.conv_depth.weight[:4] *= 60
        block.ff.conv_depth.bias[:4] *= 60
        block.ff.conv_point.weight[:, :4] /= 60
    exact = pack(copy.deepcopy(model), activation_range="per_token", overrides={"*": {"bits": 32}})
    pack(model, activation_range="per_token")
    items = make_items(8, seed=1)
    wrapper = get_family("sana").graph(model, items[0])
    graph, _ = traced(wrapper, items[0], packed_layers(model))
    return exact, graph, calibrate(runnable(graph), [as_feed(wrapper.host_inputs(item)) for item in items]), wrapper


def run(case: Any, items: list[Item]) -> tuple[list[Any], list[Any]]:
    model, _, _, wrapper = case
    expected = [each["sample"] for each in torch_outputs(model, items, ())]
    return [as_feed(wrapper.host_inputs(item)) for item in items], expected


def test_costs_are_shares_of_everything(outlier_sana: Any) -> None:
    found = candidates(outlier_sana[1])
    assert sum(candidate.cost for candidate in found) == pytest.approx(2)
    kinds = {candidate.name for candidate in found if not candidate.is_layers}
    assert {"norm", "add", "product", "softmax", "activation", "matmul", "depthwise"} <= kinds <= set(OP_KINDS)
    layers = {candidate.name: candidate.cost for candidate in found if candidate.is_layers}
    assert layers["transformer_blocks.*.ff.conv_inverted"] > layers["transformer_blocks.*.attn2.to_q"]


def test_what_costs_most_noise_keeps_16_bits_and_the_target_holds(outlier_sana: Any) -> None:
    feeds, expected = run(outlier_sana, make_items(3, seed=1))
    _, graph, ranges, _ = outlier_sana
    lowest, everything = allocate(graph, ranges, feeds, expected, start=START, target_db=-99.0)
    assert lowest.a16_ops == ()
    assert lowest.a16_layers == START.a16_layers
    assert {row["bits"] for row in everything["candidates"]} == {8}
    assert everything["share_at_16"] == pytest.approx(0, abs=1e-3)

    target = (everything["all_at_16_db"] + everything["reached_db"]) / 2
    assert everything["reached_db"] < target - 1
    precision, report = allocate(graph, ranges, feeds, expected, start=START, target_db=target)
    rows = report["candidates"]
    assert [row["bits"] for row in rows] == sorted((row["bits"] for row in rows), reverse=True)
    assert {row["bits"] for row in rows} == {8, 16}
    assert set(precision.a16_layers) > set(START.a16_layers)
    assert 0 < report["share_at_16"] < 1
    with pytest.raises(ExportError, match=r"target_db is 59, and with 16 bits everywhere the output keeps \d\d\.\d dB"):
        allocate(graph, ranges, feeds, expected, start=START, target_db=59.0)
    session = exact_session(insert_qdq(graph, ranges, precision))
    assert sqnr_db(expected, [session.run(None, feed)[0] for feed in feeds]) >= target
