"""The true tiny teachers of every family, quantized, run on the HTP emulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fbqat_hub.export import PRESETS, export_htp
from fbqat_hub.export.bundle.pipeline import record_inputs
from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import EXPORTED, call_of

#: Lowest SQNR in dB of the emulator against torch, W4A8 without training; measured 22 to 28 on trained codes.
LOWEST_DB = 15


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w4a8", "w8a16"])
@pytest.mark.parametrize("family", EXPORTED)
def test_the_emulator_computes_the_tiny_teacher(family: str, preset: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    packed = convert_pipeline(f"fbqat-hub/{FAMILIES[family].tiny}-openmoji", tmp_path / "packed")
    pipeline = load_pipeline(packed)
    call: dict[str, Any] = call_of(family, pipeline) | {"height": 64, "width": 64, "num_inference_steps": 4}
    items = record_inputs(pipeline, ["red heart", "pouting cat", "hot face"], call)
    result = export_htp(
        pipeline.transformer, items[:-2], items[-2:], tmp_path / "out", precision=PRESETS[preset], progress=False
    )
    weights = result["audit"]["qdq"]["weights_by_type"]
    assert weights.get("int4", 0) == (result["model"]["packed_layers"] if preset == "w4a8" else 0)
    assert result["precision"]["a16_layers"] == list(FAMILIES[family].a16_layers)
    assert result["coverage"]["all_on_qnn"] is True
    assert result["parity"]["emulator_vs_torch_packed"]["sqnr_db"] > LOWEST_DB
    assert len(result["blocks"]) >= len(FAMILIES[family].blocks(pipeline.transformer))
