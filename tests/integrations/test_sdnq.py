"""The exit to SDNQ: what is written, decoded by the format's own description, and loaded by SDNQ itself where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fbqat_hub import cli
from fbqat_hub.families import FAMILIES
from fbqat_hub.integrations.sdnq import export_sdnq
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer
from fbqat_hub.training.ptq import convert_pipeline
from tests.integrations.tiny import adapter_changes, drawn, layers_of, packed_as, read_elsewhere, static_ranges

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
TEACHER = "fbqat-hub/sana-tiny-openmoji"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A packed Sana of 4 and 8 bits whose layers are wide enough for SDNQ's int8 product, and its export."""
    folder = tmp_path_factory.mktemp("mixed")
    convert_pipeline(TEACHER, folder / "packed", {"average_bits": 5})
    assert cli.main(["export", str(folder / "packed"), "--to", "sdnq"]) == 0
    return folder / "packed", folder / "packed" / "sdnq"


def written_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    return config


def decoded(weight: Tensor, scale: Tensor, layer: PackedLayer) -> Tensor:
    """The real weight, from the words of the module's docstring."""
    if weight.dtype == torch.uint8:
        nibbles = torch.stack((weight & 15, weight >> 4), dim=-1).reshape(layer.weight.shape)
        return (nibbles.to(torch.int8) - 8) * scale
    return (weight.t() * scale.t() if scale.shape[0] == 1 else weight * scale).reshape(layer.weight.shape)


def test_weights_are_equal_to_the_bit(mixed) -> None:
    packed, exported = mixed
    layers, tensors = layers_of(packed), load_file(exported / WEIGHTS)
    assert {layer.weight_bits for layer in layers.values()} == {4, 8}
    assert any(layer.kernel for layer in layers.values())
    for name, layer in layers.items():
        real = decoded(tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale"), layer)
        assert torch.equal(real.reshape(layer.dequantize().shape), layer.dequantize()), name
    left = load_file(packed / WEIGHTS)
    assert tensors.keys() == {key for key in left if key.rpartition(".")[2] not in ("weight_packed", "weight_scale")}
    assert all(torch.equal(tensors[key], left[key]) for key in tensors)


def test_config_names_each_layer_once_and_exactly(mixed) -> None:
    """SDNQ takes a bare name for a part of any other name."""
    packed, exported = mixed
    layers, config = layers_of(packed), written_config(exported)
    assert (config["quant_method"], config["weights_dtype"], config["group_size"]) == ("sdnq", "int4", -1)
    wide = {f"{name}.weight" for name, layer in layers.items() if layer.weight_bits == 8}
    assert set(config["modules_dtype_dict"]["int8"]) == wide
    assert set(config["modules_to_not_convert"]) == {
        f"transformer_blocks.{block}.ff.conv_depth.weight" for block in range(5)
    }
    narrow = {name for name, layer in layers.items() if min(layer.out_features, layer.in_features) < 32}
    floats = {f"{name}.weight" for name, layer in layers.items() if layer.kernel or layer.activation_bits != 8}
    assert set(config["modules_to_not_use_matmul"]) == floats | {f"{name}.weight" for name in narrow}
    assert config["use_quantized_matmul"]
    assert floats
    assert len(floats) < len(layers)


def test_other_parts_are_copied(mixed) -> None:
    packed, exported = mixed
    for file in ("model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors"):
        assert (exported / file).read_bytes() == (packed / file).read_bytes()


def test_codes_of_three_and_six_bits(tiny_sana: Path, tmp_path: Path) -> None:
    """In the next wider storage."""
    packed = packed_as(tiny_sana, tmp_path / "packed", weight_bits=3, weight_bits_by_module={"*.attn1.to_q": 6})
    made = export_sdnq(packed, tmp_path / "out")
    tensors = load_file(made.folder / WEIGHTS)
    for name, layer in layers_of(packed).items():
        weight = tensors[f"{name}.weight"]
        assert weight.dtype == (torch.int8 if layer.weight_bits == 6 else torch.uint8)
        real = decoded(weight, tensors[f"{name}.scale"], layer)
        assert torch.equal(real.reshape(layer.dequantize().shape), layer.dequantize())
    assert made.int8 == [], "these layers are too narrow for SDNQ's int8 product"
    assert not written_config(made.folder)["use_quantized_matmul"]


def test_static_ranges_are_refused(packed_folder: Path, tmp_path: Path) -> None:
    static_ranges(packed_folder, tmp_path / "static")
    with pytest.raises(ValueError, match=r"has a static activation range, which SDNQ's format does not hold"):
        export_sdnq(tmp_path / "static", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_that_sdnq_would_divide_otherwise_are_refused(tiny_sana: Path, tmp_path: Path) -> None:
    packed = packed_as(tiny_sana, tmp_path / "packed", weight_granularity="per_group", group_size=12)
    with pytest.raises(ValueError, match=r"has 256 inputs, which groups of 12 do not divide"):
        export_sdnq(packed, tmp_path / "out")


def test_what_is_not_packed_or_packed_too_much_is_refused(tiny_sana: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no denoiser that is quantized by fbqat"):
        export_sdnq(tiny_sana, tmp_path / "out")
    packed = convert_pipeline(str(tiny_sana), tmp_path / "packed", text_encoders="w8")
    with pytest.raises(ValueError, match=r"text_encoder of .* is packed too.*without --text-encoders"):
        export_sdnq(packed, tmp_path / "out")
    with pytest.raises(FileExistsError, match="give another --output"):
        export_sdnq(packed, packed)


def test_options_of_the_other_target_are_refused(
    packed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(packed_folder), "--to", "sdnq", "--output", str(tmp_path / "out"), "--precision", "w8a8"]
    assert cli.main(command) == 1
    assert "--precision is for a phone (--to htp)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_scale_is_refused(packed_folder: Path, tmp_path: Path) -> None:
    load_pipeline(packed_folder).save_pretrained(tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / WEIGHTS)
    tensors["proj_out.weight_scale"][0] = 0.0
    save_file(tensors, tmp_path / "broken" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"proj_out.weight_scale has scales that are not finite and above 0"):
        export_sdnq(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# with SDNQ itself

LOAD = """
import sys, torch, diffusers
from sdnq.utils import get_sdnq_params
from safetensors.torch import save_file
folder, kind, target = sys.argv[1:]
model = getattr(diffusers, kind).from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
random, out = torch.Generator().manual_seed(0), {}
for name, layer in model.named_modules():
    if hasattr(layer, "sdnq_dequantizer"):
        matmul = layer.sdnq_dequantizer.use_quantized_matmul
        weight = layer.sdnq_dequantizer(**get_sdnq_params(layer), skip_quantized_matmul=matmul)
        x = torch.randn(*((64, weight.shape[1]) if weight.ndim == 2 else (1, weight.shape[1], 8, 8)), generator=random)
        with torch.no_grad():
            out |= {f"{name} weight": weight, f"{name} x": x, f"{name} y": layer(x)}
assert "fbqat_hub" not in sys.modules
save_file({name: value.contiguous() for name, value in out.items()}, target)
"""


def read_by_sdnq(folder: Path, kind: str, target: Path) -> dict[str, Tensor]:
    """By diffusers and SDNQ, without this package: "LAYER weight", an input "LAYER x" and its output "LAYER y"."""
    pytest.importorskip("sdnq")
    return read_elsewhere(LOAD, folder, kind, target)


@pytest.mark.slow
def test_sdnq_reads_every_weight_to_the_bit_and_computes_w4a8_as_we_do(mixed, tmp_path: Path) -> None:
    """Where it multiplies int8; the sums are then exact, and what is left is the rounding of float32 products."""
    packed, exported = mixed
    read = read_by_sdnq(exported, "SanaTransformer2DModel", tmp_path / "read.safetensors")
    layers = layers_of(packed)
    assert len(read) == 3 * len(layers)
    floats = written_config(exported)["modules_to_not_use_matmul"]
    for name, layer in layers.items():
        assert torch.equal(read[f"{name} weight"].reshape(layer.dequantize().shape), layer.dequantize()), name
        if f"{name}.weight" not in floats:
            with torch.no_grad():
                y = layer(read[f"{name} x"])
            assert float((y - read[f"{name} y"]).norm() / y.norm()) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"weight_granularity": "per_group", "group_size": 8}, {"weight_bits": 8}])
@pytest.mark.parametrize("family", FAMILIES)
def test_sdnq_reads_every_family_and_groups_and_eight_bits(
    teacher_of: Callable[[str], Path], tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    packed = packed_as(teacher_of(family), tmp_path / "packed", **settings)
    kind = json.loads((packed / "model_index.json").read_text())["transformer"][1]
    read = read_by_sdnq(export_sdnq(packed, tmp_path / "out").folder, kind, tmp_path / "read.safetensors")
    layers = layers_of(packed)
    assert len(read) == 3 * len(layers)
    for name, layer in layers.items():
        assert torch.equal(read[f"{name} weight"].reshape(layer.dequantize().shape), layer.dequantize()), name


@pytest.mark.slow
def test_a_whole_pipeline_draws_with_sdnq(packed_folder: Path, tmp_path: Path) -> None:
    """In float32; its layers are too narrow for SDNQ's int8 product, so that ours takes float activations too."""
    pytest.importorskip("sdnq")
    made = export_sdnq(packed_folder, tmp_path / "out")
    pictures = [drawn(made.folder), drawn(packed_folder)]
    assert 0 < float((pictures[0] - pictures[1]).abs().mean()) < 0.02


@pytest.mark.slow
def test_an_adapter_of_the_packed_model_does_the_same_in_sdnq(packed_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sdnq")
    made = export_sdnq(packed_folder, tmp_path / "out")
    changes = adapter_changes(packed_folder, made.folder, tmp_path / "adapter")
    assert changes[0].norm() > 0
    assert torch.cosine_similarity(*changes, dim=0) > 0.95
