"""The exit to ComfyUI: the file against diffusers' own reader of original checkpoints, and comfy-kitchen's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from fbqat_hub import cli
from fbqat_hub.families import FAMILIES
from fbqat_hub.integrations.comfyui import export_comfyui
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import edit_tensors, weights_of
from tests.integrations.tiny import layers_of, packed_as, static_ranges

READERS = {
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux-dev": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux-kontext": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd3.5-large": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
}


def decoded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float checkpoint that a file stands for, from the words of the module's docstring."""
    found = {key: value for key, value in tensors.items() if not key.endswith((".weight_scale", ".comfy_quant"))}
    for key in tensors:
        if key.endswith(".comfy_quant"):
            assert json.loads(bytes(tensors[key]))["format"] == "int8_tensorwise"
            name = key.removesuffix(".comfy_quant")
            found[f"{name}.weight"] = tensors[f"{name}.weight"] * tensors[f"{name}.weight_scale"]
    return found


def float_state(packed: Path) -> dict[str, Tensor]:
    """Of the dequantized denoiser, by diffusers' names."""
    layers = layers_of(packed)
    left = {
        key: value
        for key, value in load_file(weights_of(packed / "transformer")).items()
        if key.rpartition(".")[2] not in ("weight_packed", "weight_scale")
    }
    return left | {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}


@pytest.fixture
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' reader of FLUX.1 has its width, 3072, written out; here it splits in the same shares."""
    split = torch.split

    def scaled(value: Tensor, sizes: tuple[int, ...], dim: int = 0) -> tuple[Tensor, ...]:
        return split(value, [size * value.shape[dim] // sum(sizes) for size in sizes], dim)

    monkeypatch.setattr(torch, "split", scaled)


@pytest.mark.usefixtures("any_width")
@pytest.mark.parametrize("model", READERS)
def test_diffusers_reads_the_dequantized_file_to_the_bit(
    model: str, teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = packed_as(teacher_of(model), tmp_path / "packed", weight_bits_by_module={"*.to_q": 8, "*norm*": 5})
    made = export_comfyui(packed, tmp_path / "out")
    tensors = load_file(made.file)
    assert {value.dtype for key, value in tensors.items() if f"{key}_scale" in tensors} == {torch.int8}
    read = READERS[model](decoded(tensors))
    wanted = float_state(packed)
    assert read.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(read[key], wanted[key])] == []


@pytest.mark.usefixtures("any_width")
@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_a_file_of_the_original_layout_becomes_a_folder_that_is_converted(
    model: str, teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The lines of docs/real-models.md."""
    base = teacher_of(model)
    made = export_comfyui(packed_as(base, tmp_path / "packed"), tmp_path / "out")
    prefixed = {f"model.diffusion_model.{key}": value for key, value in decoded(load_file(made.file)).items()}
    save_file(prefixed | {"vae.unused": torch.zeros(2)}, tmp_path / "my.safetensors")
    kind = type(load_pipeline(base).transformer)
    denoiser = kind.from_single_file(str(tmp_path / "my.safetensors"), config=str(base), subfolder="transformer")
    DiffusionPipeline.from_pretrained(base, transformer=denoiser).save_pretrained(tmp_path / "mine")
    wanted = float_state(tmp_path / "packed")
    found = load_file(weights_of(tmp_path / "mine" / "transformer"))
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    load_pipeline(convert_pipeline(str(tmp_path / "mine"), tmp_path / "converted"))


def test_layers_left_in_float_stay_so(teacher_of: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    """And by the command line."""
    left = ["x_embedder", "norm_out.linear"]
    packed = packed_as(teacher_of("flux"), tmp_path / "packed", modules_to_not_convert=left)
    assert cli.main(["export", str(packed), "--to", "comfyui"]) == 0
    assert "models/diffusion_models" in capsys.readouterr().out
    tensors, state = load_file(packed / "comfyui" / "packed-int8.safetensors"), float_state(packed)
    assert torch.equal(tensors["img_in.weight"], state["x_embedder.weight"])
    shift, scale = tensors["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), state["norm_out.linear.weight"])
    assert "img_in.comfy_quant" not in tensors


def test_layers_of_wide_activations_are_multiplied_in_float(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    overrides = {"proj_out": {"bits": 16}, "transformer_blocks.*": {"bits": 32}}
    packed = packed_as(teacher_of("flux"), tmp_path / "packed", module_overrides=overrides)
    made = export_comfyui(packed, tmp_path / "out")
    tensors = load_file(made.file)
    for name in (*made.int8, *made.float_activations):
        described = json.loads(bytes(tensors[f"{name}.comfy_quant"]))
        assert described.get("full_precision_matrix_mult", False) == (name in made.float_activations)
    assert {"final_layer.linear", "double_blocks.0.img_attn.qkv"} <= set(made.float_activations)
    assert "single_blocks.0.linear1" in made.int8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_granularity": "per_group", "group_size": 8}, "has groups, and ComfyUI's int8 layout has one scale"),
        ({"modules_to_not_convert": ["*.attn.to_q"]}, "are one layer in ComfyUI, and .*to_q is in float"),
        ({"module_overrides": {"*.attn.to_k": {"bits": 16}}}, "have activations of different bits"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(
    settings: dict[str, Any], message: str, teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    packed = packed_as(teacher_of("flux"), tmp_path / "packed", **settings)
    with pytest.raises(ValueError, match=message):
        export_comfyui(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_static_ranges_are_refused(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    static = static_ranges(packed_as(teacher_of("flux"), tmp_path / "packed"), tmp_path / "static")
    with pytest.raises(ValueError, match="static activation range, which ComfyUI's format does not hold"):
        export_comfyui(static, tmp_path / "out")


def test_a_tensor_without_an_original_name_is_refused(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Of a denoiser with a part that the original does not have."""
    packed = packed_as(teacher_of("sd3"), tmp_path / "packed")
    family = FAMILIES["sd3"]
    names = family.original_modules(load_pipeline(packed).transformer.config)
    short = {name: original for name, original in names.items() if name != "context_embedder"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(family), "original_modules", lambda *_: short)
        with pytest.raises(ValueError, match=r"context_embedder.* has no name in the original checkpoint"):
            export_comfyui(packed, tmp_path / "out")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in READERS])
def test_other_families_are_refused_by_name(family: str, teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    packed = packed_as(teacher_of(family), tmp_path / "packed")
    with pytest.raises(ValueError, match=f"of the family {family}, .*; sd3, flux, flux-kontext are"):
        export_comfyui(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_tensor_leaves_nothing(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    packed = packed_as(teacher_of("flux"), tmp_path / "packed")
    edit_tensors(weights_of(packed / "transformer"), lambda tensors: tensors["proj_out.weight_scale"].zero_())
    with pytest.raises(ValueError, match=r"proj_out.weight_scale has scales that are not finite and above 0"):
        export_comfyui(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# with comfy-kitchen, ComfyUI's own kernels


@pytest.mark.slow
def test_comfy_kitchen_has_our_weights_to_the_bit_and_computes_w4a8_as_we_do(
    teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its int8 products are exact; what is left is the rounding of float32 products."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    packed = packed_as(teacher_of("flux"), tmp_path / "packed")
    made = export_comfyui(packed, tmp_path / "out")
    tensors, layers = load_file(made.file), layers_of(packed)
    originals = FAMILIES["flux"].original_modules(load_pipeline(packed).transformer.config)
    random = torch.Generator().manual_seed(0)
    assert len(made.int8) > 10
    for name in made.int8:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        params = kitchen.TensorWiseINT8Layout.Params(
            scale=scale, orig_dtype=torch.float32, orig_shape=tuple(weight.shape)
        )
        quantized = kitchen.QuantizedTensor(weight, "TensorWiseINT8Layout", params)
        parts: list[PackedLayer] = [layers[part] for part, original in originals.items() if original.name == name]
        wanted = torch.cat([part.dequantize() for part in parts])
        x = torch.randn(32, weight.shape[1], generator=random)
        with torch.no_grad():
            y = torch.cat([part(x) for part in parts], dim=-1)
        if originals_swapped(originals, name):
            wanted, y = (torch.cat(value.chunk(2, dim)[::-1], dim) for value, dim in ((wanted, 0), (y, -1)))
        assert torch.equal(quantized.dequantize(), wanted), name
        theirs = torch.nn.functional.linear(x, quantized, tensors.get(f"{name}.bias"))
        assert float((theirs - y).norm() / y.norm()) < 1e-6, name


def originals_swapped(originals: dict[str, Any], name: str) -> bool:
    return any(original.halves_swapped for original in originals.values() if original.name == name)
