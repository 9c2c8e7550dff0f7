"""diffusers loads, saves and quantizes our checkpoints exactly, and refuses broken ones by the tensor's name."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ConfigMixin,
    DiffusionPipeline,
    ModelMixin,
    PipelineQuantizationConfig,
    SanaTransformer2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fbqat_hub import FBQATConfig
from fbqat_hub.integrations.diffusers import attach
from fbqat_hub.pipelines import load_pipeline, save_pipeline
from fbqat_hub.quantization import (
    PackedLayer,
    PackedLinear,
    WeightScheme,
    calibrate,
    convert,
    named_layers,
    prepare,
    stored_bits_per_weight,
)
from fbqat_hub.quantization.quantize import quantize_weight
from tests.conftest import CALL, edit_tensors, subprocess_environment
from tests.test_config import KEYS

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
LAYER = "transformer_blocks.0.attn1.to_q"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "overrides": {
        "modules_to_not_convert": ["time_embed.*", "*.attn2.to_k"],
        "module_overrides": {"proj_out": {"bits": 16}, "*.ff.*": {"range": "per_tensor"}},
    },
    # the patch embedding has 4 inputs
    "groups": {"weight_granularity": "per_group", "group_size": 8, "weight_clip": "max_abs"},
    "static": {"activation_range": "static", "module_overrides": {"proj_out": {"bits": 16}}},
    "six bits": {"weight_bits": 6},
    "eight bits": {"weight_bits": 8, "activation_range": "static"},
    "two widths": {"weight_bits_by_module": {"*.attn1.*": 6, "proj_out": 8, "*.0.attn1.to_k": 4}},
}


def model_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=random).to(dtype),
        "encoder_hidden_states": torch.randn(2, 8, 8, generator=random).to(dtype),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_attention_mask": torch.tensor([[1.0] * 8, [1.0] * 3 + [0.0] * 5]),
    }


@torch.no_grad()
def predict(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(**model_inputs(dtype), return_dict=False)[0]


def convert_in_memory(transformer: Any, config: FBQATConfig) -> Any:
    """prepare -> calibrate -> convert, as training does it."""
    model = copy.deepcopy(transformer)
    prepare(model, config.weight_scheme(), **config.layer_options())
    calibrate(model, [model_inputs()] if config.needs_calibration else [], rule="min_max")
    convert(model)
    attach(model, config)
    return model


@pytest.fixture(scope="session")
def packed(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Config name -> (the packed transformer in memory, the pipeline folder it was saved in)."""
    made = {}
    for name, fields in CONFIGS.items():
        pipeline = load_pipeline(tiny_sana)
        pipeline.transformer = convert_in_memory(pipeline.transformer, FBQATConfig(**fields))
        folder = tmp_path_factory.mktemp("packed") / name
        save_pipeline(pipeline, folder)
        made[name] = (pipeline.transformer, folder)
    return made


def same_tensors(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


# exact in every way of loading


def test_fresh_process_draws_the_bit_equal_picture(packed, tmp_path: Path) -> None:
    """``import fbqat_hub`` and plain ``from_pretrained``, and nothing else of ours."""
    model, folder = packed["overrides"]
    script = f"""
import torch, fbqat_hub
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
pipe = DiffusionPipeline.from_pretrained({str(folder)!r})
inputs = load_file({str(tmp_path / "inputs.safetensors")!r})
with torch.no_grad():
    predicted = pipe.transformer(**inputs, return_dict=False)[0]
picture = pipe("dark red", generator=torch.Generator().manual_seed(3), output_type="pt", **{CALL!r}).images
out = {{"predicted": predicted.contiguous(), "picture": picture.contiguous()}}
save_file(out, {str(tmp_path / "out.safetensors")!r})
"""
    save_file(model_inputs(), tmp_path / "inputs.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=subprocess_environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["predicted"], predict(model))
    pipeline = load_pipeline(folder, transformer=model)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("dark red", generator=torch.Generator().manual_seed(3), output_type="pt", **CALL).images
    assert picture.std() > 0.01
    assert torch.equal(out["picture"], picture)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_is_exact(packed, name: str) -> None:
    model, folder = packed[name]
    loaded = DiffusionPipeline.from_pretrained(folder).transformer
    same_tensors(loaded, model)
    schemes = [{layer: each.activation_scheme for layer, each in named_layers(m, PackedLayer)} for m in (loaded, model)]
    assert schemes[0] == schemes[1]
    assert torch.equal(predict(loaded), predict(model))
    assert not loaded.training


def test_packed_differs_from_float_by_quantization_only(packed, tiny_sana: Path) -> None:
    original = predict(load_pipeline(tiny_sana).transformer)
    error = (predict(packed["default"][0]) - original).square().mean() / original.square().mean()
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize("name", ["default", "overrides", "groups", "six bits", "two widths"])
def test_quantize_on_load_equals_convert(packed, name: str, tiny_sana: Path) -> None:
    loaded = SanaTransformer2DModel.from_pretrained(
        tiny_sana, subfolder="transformer", quantization_config=FBQATConfig(**CONFIGS[name])
    )
    same_tensors(loaded, packed[name][0])
    assert torch.equal(predict(loaded), predict(packed[name][0]))


def test_quantize_on_load_through_the_pipeline(packed, tiny_sana: Path) -> None:
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": FBQATConfig()})
    pipeline = DiffusionPipeline.from_pretrained(tiny_sana, quantization_config=mapping, dtype=torch.float32)
    same_tensors(pipeline.transformer, packed["default"][0])
    assert not list(named_layers(pipeline.vae, PackedLayer))


def test_quantize_on_load_saves_what_it_is(packed, tiny_sana: Path, tmp_path: Path) -> None:
    transformer = SanaTransformer2DModel.from_pretrained(
        tiny_sana, subfolder="transformer", quantization_config=FBQATConfig(**CONFIGS["overrides"])
    )
    transformer.save_pretrained(tmp_path)
    same_tensors(SanaTransformer2DModel.from_pretrained(tmp_path), packed["overrides"][0])


def test_half_precision_keeps_codes_and_scales(packed) -> None:
    """Codes are uint8 and scales fp32 whatever dtype is asked for; the rest is of that dtype."""
    model, folder = packed["static"]
    loaded = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).transformer
    assert loaded.dtype == torch.bfloat16
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        ours = name.endswith(("weight_packed", "weight_scale", "input_scale", "input_zero_point"))
        assert value.dtype == (expected[name].dtype if ours else torch.bfloat16), name
        assert torch.equal(value, expected[name].to(value.dtype)), name
    loose = predict(loaded, torch.bfloat16).float() - predict(model)
    assert loose.square().mean() < 0.01 * predict(model).square().mean()


def test_sharded_checkpoint(packed, tmp_path: Path) -> None:
    model, folder = packed["static"]
    shutil.copytree(folder, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "sharded" / "transformer", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 2
    same_tensors(SanaTransformer2DModel.from_pretrained(tmp_path / "sharded", subfolder="transformer"), model)


@pytest.mark.parametrize("name", ["static", "eight bits"])
@pytest.mark.parametrize("device_map", ["cpu", "disk", "blocks on disk"])
def test_device_map_and_disk_offload(packed, name: str, device_map: str, tmp_path: Path) -> None:
    model, folder = packed[name]
    parts = [name for name, _ in [*model.named_children(), *model.named_parameters(recurse=False)]]
    places = {
        "cpu": "cpu",
        "disk": {"": "disk"},
        "blocks on disk": {name: "disk" if name == "transformer_blocks" else "cpu" for name in parts},
    }
    loaded = SanaTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", device_map=places[device_map], offload_folder=tmp_path
    )
    assert torch.equal(predict(loaded), predict(model))


# what the folder holds


def test_config_of_the_folder(packed) -> None:
    model, folder = packed["overrides"]
    written = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert set(written) == KEYS
    left = written["modules_to_not_convert"]
    assert left == sorted(name for name, module in model.named_modules() if type(module) is nn.Linear)
    assert "time_embed.linear" in left
    assert "transformer_blocks.1.attn2.to_k" in left
    assert written["module_overrides"] == CONFIGS["overrides"]["module_overrides"]
    loaded = DiffusionPipeline.from_pretrained(folder).transformer
    assert loaded.proj_out.activation_bits == 16
    assert loaded.get_submodule("transformer_blocks.0.ff.conv_point").activation_scheme.range == "per_tensor"
    assert loaded.get_submodule(LAYER).activation_scheme.range == "per_token"


@pytest.mark.parametrize(("name", "kept"), [("static", (torch.uint8, (16, 8))), ("eight bits", (torch.int8, (16, 16)))])
def test_stored_tensors(packed, name: str, kept: tuple[torch.dtype, tuple[int, int]]) -> None:
    tensors = load_file(packed[name][1] / WEIGHTS)
    stored = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{LAYER}.")}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "weight_packed": kept,
        "weight_scale": (torch.float32, (16,)),
        "input_scale": (torch.float32, ()),
        "input_zero_point": (torch.int32, ()),
    }


# layers of several widths


def widths_of(model: nn.Module) -> dict[str, int]:
    return {name: layer.weight_bits for name, layer in named_layers(model, PackedLayer)}


def test_widths_of_the_folder(packed) -> None:
    model, folder = packed["two widths"]
    written = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert set(written) == KEYS | {"weight_bits_by_module"}
    own = {name: bits for name, bits in widths_of(model).items() if bits != 4}
    assert list(written["weight_bits_by_module"].items()) == sorted(own.items())
    attention = {f"transformer_blocks.{block}.attn1.{name}" for block in (0, 1) for name in ATTENTION}
    assert own == dict.fromkeys(attention - {f"{LAYER[:-1]}k"}, 6) | {"proj_out": 8}
    assert written["format_version"] == 2
    bits = stored_bits_per_weight(model)
    stored = load_file(folder / WEIGHTS)
    kept = sum(value.nbytes for name, value in stored.items() if name.endswith(("weight_packed", "weight_scale")))
    assert bits == 8 * kept / sum(each.in_features * each.out_features for _, each in named_layers(model, PackedLayer))


def test_average_bits_are_given_to_the_weights_that_lose_most(tiny_sana: Path, tmp_path: Path) -> None:
    config = FBQATConfig(average_bits=5)
    model = SanaTransformer2DModel.from_pretrained(tiny_sana, subfolder="transformer", quantization_config=config)
    original = SanaTransformer2DModel.from_pretrained(tiny_sana, subfolder="transformer")
    widths = widths_of(model)
    sizes = {name: original.get_submodule(name).weight.numel() for name in widths}
    average = sum(bits * sizes[name] for name, bits in widths.items()) / sum(sizes.values())
    assert set(widths.values()) == {4, 8}
    assert 4.9 < average <= 5
    loss = {}
    for name in widths:
        weight = original.get_submodule(name).weight.detach().flatten(1)
        codes, scales = quantize_weight(weight, WeightScheme(clip="mse"))
        loss[name] = float((codes * scales[:, None] - weight).square().sum() / weight.square().sum())
    for large in (name for name, bits in widths.items() if bits == 8):
        better = [
            n for n, bits in widths.items() if bits == 4 and sizes[n] <= sizes[large] and loss[n] > 1.05 * loss[large]
        ]
        assert not better, f"{large} has 8 bits, and {better[0]}, which is no larger and loses more, has 4"

    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["format_version"], "average_bits" in written) == (2, False)
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path)
    same_tensors(loaded, model)
    assert torch.equal(predict(loaded), predict(model))
    assert config.average_bits == 5  # the caller's own config serves other models


@pytest.mark.parametrize(("average", "width"), [(4, 4), (8, 8)])
def test_extreme_averages_are_uniform(average: float, width: int, tiny_sana: Path) -> None:
    config = FBQATConfig(average_bits=average)
    model = SanaTransformer2DModel.from_pretrained(tiny_sana, subfolder="transformer", quantization_config=config)
    assert set(widths_of(model).values()) == {width}


def test_average_bits_of_shards_and_of_one_file_are_the_same(sharded: Path, tiny_sana: Path) -> None:
    config = FBQATConfig(average_bits=4.5)
    whole = SanaTransformer2DModel.from_pretrained(tiny_sana, subfolder="transformer", quantization_config=config)
    same_tensors(SanaTransformer2DModel.from_pretrained(sharded, quantization_config=config), whole)
    same_tensors(from_file(tiny_sana / WEIGHTS, tiny_sana, config), whole)


# bad checkpoints


@pytest.fixture
def broken(packed, tmp_path: Path) -> Callable[..., Path]:
    """``broken(edit)``: a copy of the static checkpoint whose tensors were edited in place."""

    def copy_and_edit(edit: Callable[[dict[str, Tensor]], object], source: Path = packed["static"][1]) -> Path:
        folder = shutil.copytree(source, tmp_path / "broken")
        edit_tensors(folder / WEIGHTS, edit)
        return folder

    return copy_and_edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_packed"), f"missing tensors: {LAYER}.weight_packed"),
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"missing tensors: {LAYER}.weight_scale"),
        (lambda t: t.pop("proj_out.input_scale"), "missing tensors: proj_out.input_scale"),
        (lambda t: t.pop("proj_out.bias"), "missing tensors: proj_out.bias"),
        (lambda t: t.pop("scale_shift_table"), "missing tensors: scale_shift_table"),
        (lambda t: t.update(lora=torch.zeros(1)), "extra tensors: lora"),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(16, 16)}), f"extra tensors: {LAYER}.weight"),
        (lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(16, 7, dtype=torch.uint8)}), r"to_q.*\(16, 7\)"),
        (lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(16, 8)}), f"{LAYER}.weight_packed is torch.float32"),
        (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(15)}), rf"{LAYER}.weight_scale has shape \(15,\)"),
        (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(16).half()}), "weight_scale is torch.float16"),
        (lambda t: t[f"{LAYER}.weight_scale"][3].fill_(torch.nan), f"{LAYER}.weight_scale has scales that are not"),
        (lambda t: t[f"{LAYER}.weight_scale"][3].fill_(torch.inf), f"{LAYER}.weight_scale has scales that are not"),
        (lambda t: t[f"{LAYER}.weight_scale"][3].zero_(), f"{LAYER}.weight_scale has scales that are not"),
        (lambda t: t[f"{LAYER}.input_scale"].fill_(torch.nan), f"{LAYER}.input_scale has scales that are not"),
        (lambda t: t[f"{LAYER}.input_zero_point"].fill_(256), f"{LAYER}.input_zero_point is 256; .* from 0 to 255"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(5)}), r"proj_out.bias"),
        (lambda t: t.update({"proj_out.bias": t["proj_out.bias"].int()}), "proj_out.bias is torch.int32; a float"),
        (lambda t: t["proj_out.bias"][3].fill_(torch.nan), rf"{WEIGHTS}: proj_out.bias has values that are not finite"),
        (lambda t: t["scale_shift_table"][0, 0].fill_(torch.inf), f"{WEIGHTS}: scale_shift_table has values"),
    ],
)
def test_broken_tensors_are_refused_by_name(broken, edit: Callable[..., object], message: str) -> None:
    folder = broken(edit)
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight"), f"missing tensors: {LAYER}.weight"),
        (lambda t: t.pop("scale_shift_table"), "missing tensors: scale_shift_table"),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(16, 15)}), rf"{LAYER}.weight has shape \(16, 15\)"),
        (lambda t: t[f"{LAYER}.weight"][0, 0].fill_(torch.inf), rf"{WEIGHTS}: {LAYER}.weight has values that are not"),
        (lambda t: t["scale_shift_table"][0, 0].fill_(torch.nan), rf"{WEIGHTS}: scale_shift_table has values that are"),
        (lambda t: t.update({f"{LAYER}.weight": torch.ones(16, 16).to(torch.int8)}), "weight is torch.int8; a float"),
        (lambda t: t.update({f"{LAYER}.scale_weight": torch.ones(())}), f"extra tensors: {LAYER}.scale_weight"),
    ],
)
def test_broken_float_checkpoint_is_not_quantized(broken, edit, message: str, tiny_sana: Path) -> None:
    folder = broken(edit, tiny_sana)
    with pytest.raises(ValueError, match=message):
        SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer", quantization_config=FBQATConfig())


@pytest.mark.parametrize(
    ("bits", "message"),
    [(6, r"weight_packed: codes run from -1\d\d to .*; 6 bits hold -32 to 31"), (4, "weight_packed is torch.int8")],
)
def test_codes_of_another_width_than_the_config_says_are_refused(
    packed, bits: int, message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed["eight bits"][1], tmp_path / "bad")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config["quantization_config"]["weight_bits"] = bits
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"patch_embed.proj is packed at 8 bits, and the config has {bits}; move"):
        attach(packed["eight bits"][0], FBQATConfig(weight_bits=bits))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3, "fbqat_version": "9.0"}, "format_version 3, written by fbqat_hub 9.0"),
        ({"format_version": 2}, "format_version is 2, and weight_bits_by_module is None"),
        ({"weight_bits_by_module": {LAYER: 8}}, "format_version is 1, and weight_bits_by_module is"),
        ({"format_version": 2, "weight_bits_by_module": {LAYER: 8}}, f"{LAYER}.weight_packed is torch.uint8"),
        ({"format_version": 2, "weight_bits_by_module": {"proj_uot": 8}}, "'proj_uot' matches no linear layer"),
        ({"average_bits": 4.5}, "config has average_bits, which says nothing of its layers"),
        ({"weigth_bits": 4}, r"'weigth_bits' \(did you mean 'weight_bits'\?\)"),
        ({"modules_to_not_convert": ["proj_uot"]}, "'proj_uot' matches no linear layer"),
        ({"module_overrides": {"proj_uot": {"bits": 16}}}, "'proj_uot' matches no linear layer"),
        ({"activation_range": "per_token", "module_overrides": {}}, "extra tensors: .*input_scale"),
    ],
)
def test_bad_config_is_refused(packed, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(packed["static"][1], tmp_path / "bad")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_range": "static"}, "'static', which quantize-on-load cannot calibrate"),
        ({"module_overrides": {"proj_out": {"range": "static"}}}, "'static', which quantize-on-load cannot calibrate"),
        ({"modules_to_not_convert": ["*"]}, "nothing to quantize"),
        ({"modules_to_not_convert": ["proj_uot"]}, "'proj_uot' matches no linear layer"),
    ],
)
def test_quantize_on_load_refuses(fields: dict[str, Any], message: str, tiny_sana: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SanaTransformer2DModel.from_pretrained(
            tiny_sana, subfolder="transformer", quantization_config=FBQATConfig(**fields)
        )


def test_quantize_on_load_names_the_layer_that_groups_do_not_suit(tiny_sana: Path, tmp_path: Path) -> None:
    config = {**SanaTransformer2DModel.load_config(tiny_sana / "transformer"), "caption_channels": 34}
    SanaTransformer2DModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"caption_projection.linear_1 cannot be quantized: group_size 8 .* 34 inputs"):
        SanaTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=FBQATConfig(weight_granularity="per_group", group_size=8)
        )


# shards of a float model


@pytest.fixture
def sharded(tiny_sana: Path, tmp_path: Path) -> Path:
    """The denoiser alone, in shards."""
    model = SanaTransformer2DModel.from_pretrained(tiny_sana, subfolder="transformer")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_quantize_on_load_of_shards(packed, sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    with propagating():
        loaded = SanaTransformer2DModel.from_pretrained(sharded, quantization_config=FBQATConfig())
    same_tensors(loaded, packed["default"][0])
    assert "were not used" not in caplog.text  # of the float weights, a line per layer


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(max(t)), "missing tensors: "),
        (lambda t: t.update(lora=torch.zeros(1)), "extra tensors: lora"),
        (lambda t: t[max(t)].view(-1)[0].fill_(torch.nan), r"-00002-of-\d+\.safetensors: .* are not finite"),
    ],
)
def test_shards_are_checked_as_single_files_are(sharded: Path, edit: Callable[..., object], message: str) -> None:
    """Whatever the index says: it is left as it was."""
    edit_tensors(sorted(sharded.glob("*.safetensors"))[1], edit)
    with pytest.raises(ValueError, match=message):
        SanaTransformer2DModel.from_pretrained(sharded, quantization_config=FBQATConfig())


# one file


def from_file(file: Path, configs: Path, config: FBQATConfig, **options: Any) -> Any:
    return SanaTransformer2DModel.from_single_file(
        str(file), config=str(configs), subfolder="transformer", quantization_config=config, **options
    )


def test_from_single_file_quantizes(packed, tiny_sana: Path, tmp_path: Path) -> None:
    name = "overrides"
    file = shutil.copy(tiny_sana / WEIGHTS, tmp_path / "sana.safetensors")
    loaded = from_file(file, tiny_sana, FBQATConfig(**CONFIGS[name]))
    same_tensors(loaded, packed[name][0])
    loaded.save_pretrained(tmp_path / "saved")
    again = SanaTransformer2DModel.from_pretrained(tmp_path / "saved")
    same_tensors(again, packed[name][0])
    assert torch.equal(predict(again), predict(packed[name][0]))


@pytest.mark.parametrize(
    ("edit", "fields", "message"),
    [
        (lambda t: t[f"{LAYER}.weight"][0, 0].fill_(torch.nan), {}, f"{LAYER}.weight has values that are not finite"),
        (lambda t: t["proj_out.bias"][0].fill_(torch.inf), {}, "proj_out.bias has values that are not finite"),
        (lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(1)}), {}, "this file is packed already"),
        (lambda t: t, {"activation_range": "static"}, "'static', which quantize-on-load cannot calibrate"),
        (lambda t: t, {"modules_to_not_convert": ["proj_uot"]}, "'proj_uot' matches no linear layer"),
    ],
)
def test_from_single_file_refuses(edit, fields: dict[str, Any], message: str, tiny_sana: Path, tmp_path: Path) -> None:
    file = shutil.copy(tiny_sana / WEIGHTS, tmp_path / "sana.safetensors")
    edit_tensors(file, edit)
    with pytest.raises(ValueError, match=message):
        from_file(file, tiny_sana, FBQATConfig(**fields))


# what can be done with a packed model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_float8_is_upcast(dtype: torch.dtype | None, broken, tiny_sana: Path) -> None:
    """Weights, biases and tables alike; diffusers leaves float8 as it is where a quantizer is at work."""
    folder = broken(lambda t: t.update({key: v.to(torch.float8_e4m3fn) for key, v in t.items()}), tiny_sana)
    model = SanaTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=FBQATConfig(), dtype=dtype
    )
    assert model.scale_shift_table.dtype == model.proj_out.bias.dtype == (dtype or torch.float32)
    assert predict(model, dtype or torch.float32).isfinite().all()


def test_a_config_serves_more_than_one_model(tiny_sana: Path) -> None:
    config = FBQATConfig(modules_to_not_convert=["*.attn2.*"])
    model = SanaTransformer2DModel.from_pretrained(tiny_sana, subfolder="transformer", quantization_config=config)
    assert config.modules_to_not_convert == ["*.attn2.*"]
    assert len(model.config["quantization_config"].modules_to_not_convert) == 8


def test_casts_that_diffusers_lets_through_keep_codes_and_scales(packed) -> None:
    model, folder = packed["static"]
    casts: list[Callable[[Any], Any]] = [lambda m: m.bfloat16(), lambda m: nn.Sequential(m).half()[0]]
    for cast in casts:
        loaded = cast(DiffusionPipeline.from_pretrained(folder).transformer).state_dict()
        for name, value in model.state_dict().items():
            if name.endswith(("weight_packed", "weight_scale", "input_scale", "input_zero_point")):
                assert torch.equal(loaded[name], value), name


@contextmanager
def propagating() -> Iterator[None]:
    """Let pytest see what diffusers logs."""
    logging.enable_propagation()
    try:
        yield
    finally:
        logging.disable_propagation()


class SharingModel(ModelMixin, ConfigMixin):
    """One layer under two names."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


def test_a_layer_under_two_names_stays_one(tmp_path: Path) -> None:
    """Quantized on load, loaded packed, and dequantized. diffusers does not save such models; other programs do."""
    torch.manual_seed(0)
    model, x = SharingModel(), torch.randn(3, 8)
    model.save_config(tmp_path)

    def save() -> None:
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file({name: value.clone() for name, value in model.state_dict().items()}, file, metadata={"format": "pt"})

    save()
    on_load = SharingModel.from_pretrained(tmp_path, quantization_config=FBQATConfig())
    assert on_load.config.quantization_config.modules_to_not_convert == []
    model = convert_in_memory(model, FBQATConfig())
    model.save_config(tmp_path)
    save()
    for loaded in (on_load, SharingModel.from_pretrained(tmp_path)):
        assert type(loaded.first) is PackedLinear
        assert loaded.first is loaded.again
        assert torch.equal(loaded(x), model(x))
        loaded.dequantize()
        assert type(loaded.first) is nn.Linear
        assert loaded.first is loaded.again
