"""What a certificate says is what was measured: of one graph, and of a chain."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fbqat_hub.export import ExportError
from fbqat_hub.export.htp import certificate, compiler
from fbqat_hub.export.htp.report import markdown
from fbqat_hub.export.htp.targets import target_for
from fbqat_hub.hub.tables import certificate_tables

pytest.importorskip("onnxruntime_qnn")


def test_coverage_is_what_the_compiling_session_was_assigned(exported: tuple[Path, dict[str, Any]]) -> None:
    """Every op of the graph that was compiled, counted here from the file, but for transpositions, of which ONNX
    Runtime joins some and moves others past an op, as several; none elsewhere."""
    folder, result = exported
    ops = Counter(node.op_type for node in onnx.load(folder / "transformer.qdq.onnx").graph.node)
    del ops["QuantizeLinear"], ops["DequantizeLinear"]
    coverage = result["coverage"]
    assert (coverage["all_on_qnn"], coverage["nodes_elsewhere"]) == (True, 0)
    others = ops.total() - ops["Transpose"]
    assert others < coverage["ops_on_qnn"] <= others + 2 * ops["Transpose"]
    said = f"{coverage['ops_on_qnn']:,} ops are on QNN, 0 nodes of the graph elsewhere."
    assert said in (folder / "certificate.md").read_text()


@pytest.mark.parametrize(
    ("assigned", "expected"),
    [
        ({"QNNExecutionProvider": {"Mul": 7}, "CPUExecutionProvider": {"Erf": 2}}, (False, 7, 2)),
        ({"QNNExecutionProvider": {"Mul": 7}, "CPUExecutionProvider": {"QuantizeLinear": 1}}, (False, 7, 1)),
        ({"CPUExecutionProvider": {"Mul": 2}}, (False, 0, 2)),
        ({"QNNExecutionProvider": {"Mul": 7, "Add": 1, "DequantizeLinear": 4}}, (True, 8, 0)),
        ({}, (False, 0, 0)),
    ],
)
def test_coverage_of_a_graph_that_is_not_all_on_qnn(
    assigned: dict[str, dict[str, int]], expected: tuple[bool, int, int]
) -> None:
    assert tuple(certificate.coverage(assigned).values()) == expected


def test_what_ran_it_is_read_back(exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = exported
    with compiler.emulator(folder / "transformer.onnx", target_for("sm8750")) as worker:
        assert worker.loaded["hardware"] == result["emulator"]["hardware"] == "CPU"
        assert set(worker.loaded["assigned"]) == {"QNNExecutionProvider"}
        assert 50 < worker.peak_rss_mib < 4000
    assert result["ran_on"] == "x86 emulator"
    assert certificate.ran_on("NPU") == "the NPU of this computer"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert certificate.ran_on("CPU") == "aarch64 emulator"


def test_every_measured_figure_changes_with_what_is_measured(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, result = exported
    size = (folder / "transformer.bin").stat().st_size
    assert result["cost"]["binary_bytes"] == result["files"]["transformer.bin"]["bytes"] == size
    assert result["precision"]["weight_bits"] == 4
    assert result["precision"]["code_bits"] == {"4": 17}
    assert result["precision"]["layer_bits"] == {"8": 13, "16": 4}  # the last layer, the timestep's path
    assert result["audit"]["qdq"]["packed_weights_bit_equal"] == result["model"]["packed_layers"] == 17
    assert result["calibration_inputs"] == 16
    assert sum(result["audit"]["compiled"]["ops"].values()) == result["audit"]["compiled"]["nodes"]
    assert result["machine"]["cores"] >= 1
    assert set(result["versions"]) >= {"torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-qnn", "qnn_sdk"}
    assert result["compiler"]["peak_rss_mib"] > 50
    assert result["seconds"]["transformer: compile"] >= result["compiler"]["seconds"] > 0


def part(scale: int, **changes: Any) -> dict[str, Any]:
    compared = {name: {"sqnr_db": 40.0 - scale, "cosine": 1.0} for name in certificate.thresholds()}
    section: dict[str, Any] = {
        "read_back": {"qnn_sdk_build": "v2"},
        "precision": {"weight_bits": 4, "code_bits": {"4": scale}, "layer_bits": {"8": scale, "16": 1}},
        "tensors": {"inputs": [f"in{scale}"], "outputs": [f"out{scale}"]},
        "coverage": {"all_on_qnn": True, "ops_on_qnn": 10 * scale, "nodes_elsewhere": 0},
        "audit": {},
        "cost": {"macs": 100 * scale},
        "parity": compared,
        "blocks": {f"b{scale}": compared},
        "op_parity": {
            "ops": scale,
            "largest": {"error": 0.1 / scale, "op": f"op{scale}"},
            "largest_by_op": {"Mul u8": 0.1 / scale, f"Add u{scale}": 0.01},
        },
        "probed_blocks": {"probed": 1, "of": scale},
        "compiler": {"seconds": 1.5 * scale, "peak_rss_mib": 50.0 * scale},
        "emulator": {"hardware": "CPU", "run_seconds": 2.0, "peak_rss_mib": None},
    }
    return section | changes


def test_a_chain_is_the_sum_and_the_worst_of_its_graphs() -> None:
    joined = certificate.joined({"a": part(1), "b": part(2)})
    assert joined["coverage"] == {"all_on_qnn": True, "ops_on_qnn": 30, "nodes_elsewhere": 0}
    assert joined["precision"] == {"weight_bits": 4, "code_bits": {"4": 3}, "layer_bits": {"8": 3, "16": 2}}
    assert joined["cost"] == {"macs": 300}
    assert joined["compiler"] == {"seconds": 4.5, "peak_rss_mib": 100.0}
    assert joined["emulator"] == {"hardware": "CPU", "run_seconds": 4.0, "peak_rss_mib": None}
    assert joined["op_parity"]["ops"] == 3
    assert joined["op_parity"]["largest"] == {"error": 0.1, "op": "op1"}
    assert joined["op_parity"]["largest_by_op"] == {"Add u1": 0.01, "Add u2": 0.01, "Mul u8": 0.1}
    assert joined["probed_blocks"] == {"probed": 2, "of": 3}
    assert joined["parity"]["emulator_vs_cpu_qdq"]["sqnr_db"] == 38.0
    assert joined["tensors"] == {"inputs": ["in1"], "outputs": ["out2"]}
    assert list(joined["blocks"]) == ["b1", "b2"]
    elsewhere = {"all_on_qnn": False, "ops_on_qnn": 9, "nodes_elsewhere": 1}
    joined = certificate.joined({"a": part(1, coverage=elsewhere), "b": part(2)})
    assert joined["coverage"] == {"all_on_qnn": False, "ops_on_qnn": 29, "nodes_elsewhere": 1}


def test_the_gate_is_on_both_comparisons() -> None:
    good = {name: {"sqnr_db": threshold} for name, threshold in certificate.thresholds().items()}
    certificate.gate(good)
    for name, threshold in certificate.thresholds().items():
        for wrong in (threshold - 0.01, float("nan"), float("-inf")):
            with pytest.raises(ExportError, match=f"{name.replace('_', ' ')}: SQNR is"):
                certificate.gate(copy.deepcopy(good) | {name: {"sqnr_db": wrong}})


def test_a_graph_that_was_not_emulated_is_gated_as_the_reference_computes_it() -> None:
    certificate.gate({"cpu_qdq_vs_torch_packed": {"sqnr_db": 10.0}})
    for wrong in (9.9, float("nan")):
        with pytest.raises(ExportError, match=r"cpu qdq vs torch packed: SQNR is .* dB, at least 10 dB is needed"):
            certificate.gate({"cpu_qdq_vs_torch_packed": {"sqnr_db": wrong}})


@pytest.mark.parametrize(("bits", "stored"), [(4, "two per byte"), (8, "one per byte")])
def test_codes_stay_at_4_bits_whatever_they_are_stored_in(
    bits: int, stored: str, exported: tuple[Path, dict[str, Any]]
) -> None:
    described = copy.deepcopy(exported[1])
    described["precision"]["weight_bits"] = bits
    assert f"Packed weights are 4-bit codes (17 layers), stored {stored}; the activations" in markdown(described)


def test_layers_that_keep_more_bits_than_were_asked_for_are_counted(exported: tuple[Path, dict[str, Any]]) -> None:
    """Trained with activations of 16 bits or in float, they compute at 16 in a W4A8 export."""
    described = copy.deepcopy(exported[1])
    assert "multiplied with have 8 bits (13 layers) and 16 bits (4 layers). Layers" in markdown(described)
    described["precision"]["layer_bits"] = {"16": 17}
    assert "multiplied with have 16 bits (17 layers). Layers" in markdown(described)


def test_a_card_reads_this_certificate_and_older_ones(exported: tuple[Path, dict[str, Any]]) -> None:
    """An older one has the machine as text, and a constant for its coverage."""
    new = dict(certificate_tables(exported[1])["rest"])
    assert new["coverage.nodes_elsewhere"] == "0"
    assert new["machine.cores"] == str(exported[1]["machine"]["cores"])
    old = exported[1] | {"machine": "Linux x86_64", "coverage": {"all_on_qnn": True, "nodes_elsewhere": 0}}
    assert dict(certificate_tables(old)["rest"])["machine"] == "Linux x86_64"


def test_equal_outputs_are_a_number_of_json() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    found = [certificate.compare([one], [one]), certificate.compare([zero], [one])]
    assert [each["sqnr_db"] for each in found] == [200.0, -200.0]
    json.dumps(found, allow_nan=False)


def test_parity_compares_three_ways() -> None:
    exact, near, far = ([np.array([3.0, 4.0])], [np.array([3.0, 4.5])], [np.array([3.0, 5.0])])
    found = certificate.comparisons(far, near, exact)
    # against torch: 10 log10(25 / 1), 10 log10(25 / 0.25); against the CPU: 10 log10(29.25 / 0.25)
    ratios = {name: each["sqnr_db"] for name, each in found.items()}
    assert ratios == {
        "emulator_vs_cpu_qdq": 20.682,
        "emulator_vs_torch_packed": 13.979,
        "cpu_qdq_vs_torch_packed": 20.0,
    }
