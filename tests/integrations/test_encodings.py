"""The exit to AIMET's and QNN's encodings: codes come back from the float weights and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from fbqat_hub import cli
from fbqat_hub.integrations.encodings import export_encodings
from tests.conftest import weights_of
from tests.integrations.tiny import layers_of, packed_as, static_ranges


def exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(weights_of(folder / "transformer")), json.loads(
        (folder / "transformer/encodings.json").read_text()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits_by_module": {"*.attn1.to_q": 8, "*.attn1.to_k": 6}},
        {"weight_granularity": "per_group", "group_size": 8},
    ],
)
def test_codes_come_back_from_float_weights_and_encodings(
    settings: dict[str, Any], tiny_sana: Path, tmp_path: Path, capsys: Any
) -> None:
    packed = packed_as(tiny_sana, tmp_path / "packed", **settings)
    assert cli.main(["export", str(packed), "--to", "encodings", "--output", str(tmp_path / "out")]) == 0
    assert "saved" in capsys.readouterr().out
    tensors, found = exported(tmp_path / "out")
    layers = layers_of(packed)
    assert found["version"] == "1.0.0"
    assert found["activation_encodings"] == []
    assert {each["name"] for each in found["param_encodings"]} == {f"{name}.weight" for name in layers}
    for each in found["param_encodings"]:
        layer, weight = layers[each["name"].removesuffix(".weight")], tensors[each["name"]].flatten(1)
        rows = weight.reshape(len(each["scale"]), -1)  # a channel, or a block of one, each
        assert each["enc_type"] == ("PER_CHANNEL" if len(rows) == len(weight) else "PER_BLOCK")
        assert each["enc_type"] == "PER_CHANNEL" or each["block_size"] == rows.shape[1]
        scale, offset = (torch.tensor(each[key])[:, None] for key in ("scale", "offset"))
        codes = torch.round(rows / scale) - offset  # from 0
        assert codes.min() >= 0
        assert codes.max() < 2 ** each["bw"]
        assert torch.equal((codes + offset).reshape(weight.shape), layer.codes().float())
        assert torch.equal((scale * (codes + offset)).reshape(weight.shape), weight)


def test_the_pipeline_is_a_float_one_of_the_same_weights(packed_folder: Path, tmp_path: Path) -> None:
    made = export_encodings(packed_folder, tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(made.folder, dtype=torch.float32)
    modules = dict(pipeline.transformer.named_modules())
    assert type(modules["proj_out"]) is torch.nn.Linear
    for name, layer in layers_of(packed_folder).items():
        assert torch.equal(modules[name].weight.flatten(1), layer.dequantize()), name


def test_static_ranges_are_encodings_of_inputs(packed_folder: Path, tmp_path: Path) -> None:
    made = export_encodings(static_ranges(packed_folder, tmp_path / "static"), tmp_path / "out")
    found = exported(made.folder)[1]["activation_encodings"]
    layers = layers_of(packed_folder)
    assert len(found) == made.activations == len(layers)
    for each in found:
        layer = layers[each["name"].removesuffix(".input")]
        assert (each["bw"], each["offset"], each["is_sym"]) == (layer.activation_bits, [-3], False)
        assert torch.tensor(each["scale"]) == torch.tensor([0.1])
