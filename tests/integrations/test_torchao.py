"""The exit to torchao: what is written, by the format's own description, and loaded by torchao itself where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fbqat_hub import cli
from fbqat_hub.families import FAMILIES
from fbqat_hub.integrations.torchao import export_torchao
from tests.conftest import weights_of
from tests.integrations.tiny import adapter_changes, drawn, layers_of, packed_as, read_elsewhere, static_ranges


def described(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        header: dict[str, str] = opened.metadata()
    return {name: json.loads(text) for name, text in header.items() if name != "format"}


def test_codes_and_scales_are_kept_and_described(tiny_sana: Path, tmp_path: Path, capsys: Any) -> None:
    packed = packed_as(
        tiny_sana,
        tmp_path / "packed",
        weight_bits_by_module={"*.attn1.to_q": 8, "*.attn1.to_k": 5},
        module_overrides={"proj_out": {"bits": 16}},
    )
    assert cli.main(["export", str(packed), "--to", "torchao"]) == 0
    layers = layers_of(packed)
    convolutions = {name for name, layer in layers.items() if layer.kernel}
    assert f"1 with float activations, {len(convolutions)} in float32" in capsys.readouterr().out
    file = weights_of(packed / "torchao" / "transformer")
    tensors, names = load_file(file), described(file)
    for name, layer in layers.items():
        if name in convolutions:
            assert names[f"{name}.weight"] == {"_type": "Tensor"}
            assert torch.equal(tensors.pop(f"{name}.weight").flatten(1), layer.dequantize())
            continue
        found = names[f"{name}.weight"]
        assert found["_data"]["block_size"] == [1, layer.in_features]
        assert (found["_data"]["act_quant_kwargs"] is None) == (name == "proj_out")
        assert torch.equal(tensors.pop(f"{name}._weight_qdata"), layer.codes())
        assert torch.equal(tensors.pop(f"{name}._weight_scale"), layer.weight_scale[:, None])
    assert sorted(tensors) == sorted(set(names["tensor_names"]) - {f"{name}.weight" for name in layers})


def test_groups_are_written_in_float(tiny_sana: Path, tmp_path: Path) -> None:
    packed = packed_as(tiny_sana, tmp_path / "packed", weight_granularity="per_group", group_size=8)
    made = export_torchao(packed, tmp_path / "out")
    tensors = load_file(weights_of(made.folder / "transformer"))
    layers = layers_of(packed)
    grouped = {name for name, layer in layers.items() if layer.weight_scale.numel() > layer.out_features}
    assert grouped
    assert grouped <= set(made.float_weights)
    for name in grouped:
        assert torch.equal(tensors[f"{name}.weight"].flatten(1), layers[name].dequantize())


def test_static_ranges_are_refused(packed_folder: Path, tmp_path: Path) -> None:
    static = static_ranges(packed_folder, tmp_path / "static")
    with pytest.raises(ValueError, match="static activation range, which torchao's format does not hold"):
        export_torchao(static, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# with torchao itself

LOAD = """
import sys, torch, diffusers
from safetensors.torch import save_file
folder, kind, target = sys.argv[1:]
model = getattr(diffusers, kind).from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
random, out = torch.Generator().manual_seed(0), {}
for name, layer in model.named_modules():
    if type(getattr(layer, "weight", None)).__name__ == "Int8Tensor":
        x = torch.randn(32, layer.weight.shape[1], generator=random)
        with torch.no_grad():
            out |= {f"{name} weight": layer.weight.dequantize(), f"{name} x": x, f"{name} y": layer(x)}
assert "fbqat_hub" not in sys.modules
save_file({name: value.contiguous() for name, value in out.items()}, target)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_torchao_reads_every_weight_to_the_bit_and_computes_nearly_as_we_do(
    family: str, teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its scale of a token is max|x| / 127.5, ours max|x| / 127: a code of the input differs by one now and then."""
    pytest.importorskip("torchao")
    packed = packed_as(teacher_of(family), tmp_path / "packed")
    made = export_torchao(packed, tmp_path / "out")
    read = read_elsewhere(LOAD, made.folder, FAMILIES[family].denoiser_class, tmp_path / "read.safetensors")
    layers = layers_of(packed)
    assert len(read) == 3 * len(made.int8) > 0
    for name in made.int8:
        assert torch.equal(read[f"{name} weight"], layers[name].dequantize()), name
        with torch.no_grad():
            y = layers[name](read[f"{name} x"])
        assert float((y - read[f"{name} y"]).norm() / y.norm()) < 0.02, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_pipeline_draws_with_torchao(dtype: torch.dtype, packed_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    made = export_torchao(packed_folder, tmp_path / "out")
    pictures = [drawn(made.folder, dtype), drawn(packed_folder)]
    assert 0 < float((pictures[0] - pictures[1]).abs().mean()) < 0.03


@pytest.mark.slow
def test_an_adapter_of_the_packed_model_does_the_same_in_torchao(packed_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    made = export_torchao(packed_folder, tmp_path / "out")
    changes = adapter_changes(packed_folder, made.folder, tmp_path / "adapter")
    assert changes[0].norm() > 0
    assert torch.cosine_similarity(*changes, dim=0) > 0.95
