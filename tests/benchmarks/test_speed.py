"""What the speed benchmarks count, as far as it does not depend on the machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed_cpu import float_model, inputs, kept_bytes, packed_copy
from benchmarks.speed_peers import PACKAGES, PEERS, Row
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.kernels import cpu, native
from fbqat_hub.quantization.packed import PackedLayer

SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "num_layers": 1,
}


@pytest.fixture
def packed() -> torch.nn.Module:
    return packed_copy(float_model(**SMALL))


def test_a_forward_quantizes_and_multiplies_once_a_layer(
    packed: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions, calls = native.load(), {"quantize": 0, "multiply": 0}
    if functions is None:
        pytest.skip("the C kernel needs a C compiler and x86 with AVX2")
    monkeypatch.setattr(cpu, "_has_amx", lambda: False)

    def counted(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls[name] += 1
            getattr(functions, name)(*arguments)

        return call

    monkeypatch.setattr(
        native, "load", lambda: functions._replace(quantize=counted("quantize"), multiply=counted("multiply"))
    )
    with torch.no_grad():
        packed(**inputs(side=4))
    layers = [layer for _, layer in named_layers(packed, PackedLayer) if layer.activation_bits == 8]
    assert len(layers) > 10
    assert calls == {"quantize": len(layers), "multiply": len(layers)}
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert sum(map(kept_bytes, layers)) / weights <= 0.6  # half a byte, and scales


@pytest.mark.skipif(not cpu._has_fast_products(), reason="oneDNN's kernel needs x86 with AVX2")
def test_onednn_keeps_a_byte_more(packed: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    with torch.no_grad():
        packed(**inputs(side=4))
    layers = [layer for _, layer in named_layers(packed, PackedLayer) if layer.activation_bits == 8]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert 1.5 <= sum(map(kept_bytes, layers)) / weights <= 1.6


def test_every_peer_has_its_packages_pinned() -> None:
    assert {peer.package for peer in PEERS.values()} == {"", *PACKAGES}
    assert all("==" in package for packages in PACKAGES.values() for package in packages)


@pytest.mark.slow
def test_a_peer_that_does_not_run_is_a_row_with_the_reason(tmp_path: Path) -> None:
    rows = [
        Row(name, Path(sys.executable), 1, tmp_path / "float32.safetensors", tmp_path / "log")
        for name in ("float32", "fbqat", "HQQ int4")
    ]
    for row in rows:
        row.forward()
    float32, ours, theirs = (row.close() for row in rows)
    assert float32["ms"] > 0
    assert 0 < ours["error"] < 0.2
    assert theirs["reason"] == "ModuleNotFoundError: No module named 'hqq'"
    assert "ms" not in theirs
