"""The doctor names what would fail late, and stays silent where nothing would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle import doctor
from fbqat_hub.export.htp.targets import TARGETS, target_for
from fbqat_hub.files import sha256
from fbqat_hub.quantization import PackedLayer
from tests.export.conftest import float_sana, pack

ELITE = target_for("sm8750")


def levels(findings: list[doctor.Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_a_good_model_has_no_errors(packed_sana: nn.Module) -> None:
    findings = doctor.diagnose_model(packed_sana)
    assert set(levels(findings)) == {"ok"}
    size = doctor.graph_bytes(packed_sana)
    packed = sum(m.weight_packed.nbytes for m in packed_sana.modules() if isinstance(m, PackedLayer))
    assert packed < size < 2 * packed


def test_missing_ranges_are_a_warning() -> None:
    findings = doctor.diagnose_model(pack(float_sana(), activation_range="per_token"))
    (warning,) = [finding.what for finding in findings if finding.level == "warning"]
    assert warning.startswith("17 of 17 layers have no static activation range")


def test_a_graph_of_two_gibibytes_is_to_be_split(packed_sana: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MAX_GRAPH_BYTES", doctor.graph_bytes(packed_sana))
    errors = [finding for finding in doctor.diagnose_model(packed_sana) if finding.level == "error"]
    assert len(errors) == 1
    assert "--graphs 2" in errors[0].cure


def test_what_takes_hours_to_emulate_is_said(packed_sana: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SLOW_TO_EMULATE", 1000)
    (warning,) = [each for each in doctor.diagnose_model(packed_sana) if each.level == "warning"]
    assert "a forward on the emulator takes minutes" in warning.what
    assert "--quick" in warning.cure


@pytest.mark.parametrize(
    ("model", "what"), [(nn.Linear(2, 2), "Linear is of no supported family"), (float_sana(), "has no packed layer")]
)
def test_what_cannot_be_exported(model: nn.Module, what: str) -> None:
    findings = doctor.diagnose_model(model)
    assert levels(findings) == ["error"]
    assert what in findings[0].what


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("[ ERROR ]  <E> Transport layer setup failed: 14001", "ADSP_LIBRARY_PATH"),
        ("Stub lib id mismatch: expected (v2.28.2), detected (v2.25.17)", "of one SDK"),
        ("Unable to load Remote symbols 1008", "of one SDK"),
        ("Failed to create context from binary with err 5005", "less VTCM"),
    ],
)
def test_known_error_codes(line: str, cure: str) -> None:
    found = doctor.diagnose_log(line)
    assert levels(found) == ["error"]
    assert cure in found[0].cure


def test_an_unknown_log_is_not_explained() -> None:
    assert levels(doctor.diagnose_log("segmentation fault at 0x150080")) == ["warning"]


def test_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no bundle"):
        doctor.diagnose_bundle(tmp_path, ELITE)
    (tmp_path / "transformer.bin").write_bytes(b"binary")
    described = {"transformer.bin": {"bytes": 6, "sha256": sha256(tmp_path / "transformer.bin")}}
    target = {"soc": "sm8750", "title": "Snapdragon 8 Elite"}
    manifest = {"files": described, "target": target, "qnn_sdk_build": "v2.51"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert levels(doctor.diagnose_bundle(tmp_path, ELITE)) == ["ok", "ok"]
    assert "is for Snapdragon 8 Elite" in doctor.diagnose_bundle(tmp_path, target_for("sm8650"))[0].what
    (tmp_path / "transformer.bin").write_bytes(b"binarz")
    assert "damaged" in doctor.diagnose_bundle(tmp_path, ELITE)[0].what
    (tmp_path / "transformer.bin").unlink()
    assert "missing" in doctor.diagnose_bundle(tmp_path, ELITE)[0].what


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is none of a bundle"),
        ("{}", "none of a"),
        ("{", "is not JSON"),
        ('{"target": "sm8750", "qnn_sdk_build": "2", "files": {}}', "one of them is not as exported"),
        ('{"target": {"soc": "s", "title": "t"}, "qnn_sdk_build": "2", "files": ["a"]}', "not as exported"),
        ('{"target": {"soc": "s", "title": "t"}, "qnn_sdk_build": "2", "files": {"a": {"bytes": 1}}}', "not as"),
    ],
)
def test_a_manifest_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"manifest\.json .*{message}"):
        doctor.diagnose_bundle(tmp_path, ELITE)


def test_targets_are_distinct() -> None:
    assert len({target.soc_model for target in TARGETS.values()}) == len(TARGETS)
    assert min(target.vtcm_mb for target in TARGETS.values()) >= 4
