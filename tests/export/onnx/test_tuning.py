"""A QDQ graph computed and trained in torch: the same numbers, gradients to all that is learned, and back to ONNX."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export import ExportError, export_htp
from fbqat_hub.export.bundle.pipeline import record_inputs
from fbqat_hub.export.htp.audit import audit_qdq
from fbqat_hub.export.htp.checks import check_tuning
from fbqat_hub.export.onnx import tuning as module
from fbqat_hub.export.onnx.calibration import calibrate
from fbqat_hub.export.onnx.fake_quantized import FakeQuantizedGraph
from fbqat_hub.export.onnx.float_graph import as_feed, packed_layers, runnable
from fbqat_hub.export.onnx.items import torch_outputs
from fbqat_hub.export.onnx.precision import Precision
from fbqat_hub.export.onnx.qdq import insert_qdq
from fbqat_hub.export.onnx.reference import exact_session
from fbqat_hub.export.onnx.rewrite import traced
from fbqat_hub.export.onnx.tuning import Tuning, computed, stacked, train, tune_graph
from fbqat_hub.families import FAMILIES, family_of_denoiser
from fbqat_hub.families.graph import GraphWrapper
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import EXPORTED, call_of
from tests.export.conftest import Item, float_sana, make_items
from tests.export.graphs import one_op

Quantized = tuple[GraphWrapper, onnx.ModelProto, dict[str, Any]]


def quantized(transformer: nn.Module, items: list[Item]) -> Quantized:
    """The wrapper, the QDQ graph at the bits that an export gives it, and the packed layers by module name."""
    family = family_of_denoiser(type(transformer).__name__)
    wrapper = family.graph(transformer, items[0])
    graph, _ = traced(wrapper, items[0], packed_layers(transformer))
    ranges = calibrate(runnable(graph), [as_feed(wrapper.host_inputs(item)) for item in items])
    model = insert_qdq(graph, ranges, Precision(a16_layers=family.a16_layers))
    return wrapper, model, {graph.module_names[name]: layer for name, layer in graph.layers.items()}


@pytest.fixture(scope="module")
def sana(packed_sana: nn.Module, calibration: list[Item]) -> Quantized:
    return quantized(packed_sana, calibration)


def agreement(graph: FakeQuantizedGraph, model: onnx.ModelProto, wrapper: GraphWrapper, items: list[Item]) -> float:
    """The best SQNR in dB, of all items, of the graph in torch to the exact CPU reference of `model`.

    One value that lies between two codes to the last bit and is rounded the other way is a step of 8 bits, which later
    layers amplify to 30 dB. A wrong op would be wrong for every item.
    """
    session = exact_session(model)
    expected = [session.run(None, as_feed(wrapper.host_inputs(item)))[0] for item in items]
    return max(sqnr_db([a], [b]) for a, b in zip(expected, computed(graph, wrapper, items), strict=True))


def shaken(model: onnx.ModelProto) -> FakeQuantizedGraph:
    """The graph with every parameter moved."""
    graph = FakeQuantizedGraph(model)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)
    return graph


def test_the_graph_in_torch_computes_what_the_reference_computes(sana: Quantized, held_out: list[Item]) -> None:
    wrapper, model, _ = sana
    assert agreement(FakeQuantizedGraph(model), model, wrapper, held_out) > 60


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPORTED)
def test_of_every_family(family: str, tmp_path: Path) -> None:
    packed = convert_pipeline(f"fbqat-hub/{FAMILIES[family].tiny}-openmoji", tmp_path / "packed")
    pipeline = load_pipeline(packed)
    call: dict[str, Any] = call_of(family, pipeline) | {"height": 64, "width": 64, "num_inference_steps": 4}
    items = record_inputs(pipeline, ["red heart", "pouting cat", "hot face"], call)
    wrapper, model, _ = quantized(pipeline.transformer, items)
    assert agreement(FakeQuantizedGraph(model), model, wrapper, items) > 60
    graph = shaken(model)
    assert agreement(graph, graph.to_onnx(), wrapper, items) > 60


def test_untrained_it_is_the_same_file(sana: Quantized) -> None:
    _, model, _ = sana
    assert FakeQuantizedGraph(model).to_onnx().SerializeToString() == model.SerializeToString()


def test_a_gradient_reaches_every_range_scale_and_bias(sana: Quantized, calibration: list[Item]) -> None:
    wrapper, model, _ = sana
    graph = FakeQuantizedGraph(model)
    made = graph(stacked([wrapper.host_inputs(item) for item in calibration]))[wrapper.output_name]
    made.square().sum().backward()
    moves = graph._scale_moves.bool()
    exact = torch.zeros_like(moves)
    exact[graph._places["encoder_attention_bias/u16"].index] = True  # 0 and -30, the ends of its range
    assert torch.equal(graph.scales.grad != 0, moves & ~exact)
    assert not bool(moves.all())  # softmax and sigmoid keep the scale of the HTP's tables
    for name, parameter in graph.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name
        assert name == "zero_points" or bool(parameter.grad.any()), name


def fixed_scales(graph: FakeQuantizedGraph) -> set[str]:
    """Names of the scales that must stay: of softmax and sigmoid."""
    return {f"{name}/scale" for name, place in graph._places.items() if graph._fixed[place.index]}


def test_the_graph_that_is_written_holds_exactly_what_was_learned(sana: Quantized, held_out: list[Item]) -> None:
    wrapper, model, _ = sana
    graph = shaken(model)
    written = graph.to_onnx()
    again = FakeQuantizedGraph(written)  # refuses views that do not share their input's encoding
    for first, second in zip(graph.encodings(), again.encodings(), strict=True):
        assert torch.equal(first, second)
    assert agreement(graph, written, wrapper, held_out) > 60
    constants = {item.name: item for item in written.graph.initializer}
    before = {item.name: item for item in model.graph.initializer}
    changed = {name for name in constants if constants[name] != before[name]}
    assert {f"{name}/scale" for name in graph._places} - changed == fixed_scales(graph)
    assert all(name.endswith(("/scale", "/zero_point", "/bias/codes", "/floor/codes")) for name in changed)
    scale, zero_point = (values.detach() for values in graph.encodings())
    for node in written.graph.node:
        if node.op_type == "QuantizeLinear":
            place = graph._places[node.output[0].removesuffix("/q")]
            factor = 256 if place.widened else 1
            assert float(numpy_helper.to_array(constants[node.input[1]])) == float(scale[place.index]) / factor
            assert int(numpy_helper.to_array(constants[node.input[2]])) == int(zero_point[place.index]) * factor


def test_tuning_lowers_the_loss_on_samples_kept_apart_and_is_audited_against_what_it_learned(
    packed_sana: nn.Module, sana: Quantized, held_out: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper, model, layers = sana
    monkeypatch.setattr(module, "APART", 8)
    kept = copy.deepcopy(dict(packed_sana.state_dict()))
    tuning = Tuning(steps=12, seed=0, draw=lambda number: make_items(1, seed=100 + number)[0], teacher=float_sana())
    packed = [each["sample"] for each in torch_outputs(packed_sana, held_out, ())]
    made = [
        tune_graph(
            model, layers=layers, tuning=tuning, wrapper=wrapper, held_out=held_out, packed=packed, progress=False
        )
        for _ in range(2)
    ]
    tuned = made[0]
    report = tuned.report
    assert report["loss_after"] < 0.9 * report["loss_before"]
    assert report["tuned_vs_teacher"]["sqnr_db"] > report["untuned_vs_teacher"]["sqnr_db"]
    assert made[1].model.SerializeToString() == tuned.model.SerializeToString()
    audited = audit_qdq(tuned.model, tuned.layers, Precision(a16_layers=FAMILIES["sana"].a16_layers))
    assert audited["packed_weights_bit_equal"] == audited["static_input_encodings_bit_equal"] == len(layers)
    with pytest.raises(ExportError, match="differ from the packed layer's"):
        audit_qdq(tuned.model, layers, Precision(a16_layers=FAMILIES["sana"].a16_layers))
    assert all(torch.equal(value, kept[name]) for name, value in packed_sana.state_dict().items())
    reference = exact_session(tuned.model)
    expected = [reference.run(None, as_feed(wrapper.host_inputs(item)))[0] for item in held_out]
    assert max(sqnr_db([a], [b]) for a, b in zip(expected, tuned.outputs["torch_tuned"], strict=True)) > 60


def test_inputs_that_are_not_finite_end_it_with_one_error(sana: Quantized, held_out: list[Item]) -> None:
    wrapper, model, _ = sana
    item = {**held_out[0], "hidden_states": torch.full_like(held_out[0]["hidden_states"], torch.nan)}
    tuning = Tuning(steps=1, seed=0, draw=lambda _: item, teacher=float_sana())
    with pytest.raises(ExportError, match="the loss of tuning step 1 is nan"):
        train(FakeQuantizedGraph(model), tuning, wrapper, progress=False)


def test_an_op_without_a_form_in_torch_is_named() -> None:
    model = one_op("Sin", {"x": [1, 4]})
    with pytest.raises(ExportError, match=r"op Sin \(op\) cannot be tuned"):
        FakeQuantizedGraph(model)


@pytest.mark.parametrize(
    ("steps", "graphs", "says"),
    [(-1, 1, "tune is -1; give a number of steps"), (1.5, 1, "tune is 1.5"), (5, 2, "only a model in one graph")],
)
def test_steps_that_cannot_be(steps: Any, graphs: int, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        check_tuning(steps, graphs)
    check_tuning(0, graphs)


@pytest.mark.slow
def test_what_was_learned_is_what_is_compiled_and_certified(
    packed_sana: nn.Module, calibration: list[Item], held_out: list[Item], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_qnn")
    tuning = Tuning(steps=3, seed=5, draw=lambda number: make_items(1, seed=100 + number)[0], teacher=float_sana())
    certificate = export_htp(packed_sana, calibration, held_out, tmp_path / "out", tuning=tuning, progress=False)
    report, parity = certificate["tuning"], certificate["parity"]
    assert (report["steps"], report["seed"]) == (3, 5)
    assert report["loss_after"] < report["loss_before"]
    assert parity["emulator_vs_torch_tuned"]["sqnr_db"] > 25
    assert parity["emulator_vs_teacher"]["sqnr_db"] > 10
    assert "The graph was tuned: 3 steps of 8 samples, seed 5" in (tmp_path / "out" / "certificate.md").read_text()
    shipped = onnx.load(tmp_path / "out" / "transformer.qdq.onnx")
    again = FakeQuantizedGraph(shipped)
    wrapper = family_of_denoiser(type(packed_sana).__name__).graph(packed_sana, held_out[0])
    expected = report["tuned_vs_teacher"]["sqnr_db"]
    teacher = [tuning.predicted(item).numpy() for item in held_out]
    assert sqnr_db(teacher, computed(again, wrapper, held_out)) == pytest.approx(expected, abs=0.5)
