"""Every way that diffusers has to load, place and save a model works on packed ones of every family, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.modeling import compute_module_sizes
from torch import Tensor, nn

from fbqat_hub import FBQATConfig
from fbqat_hub.families import FAMILIES
from fbqat_hub.integrations.diffusers import FBQATDiffusersQuantizer
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.quantization.convert import quantizable
from tests.conftest import MOST_FAMILIES
from tests.integrations.tiny import pack_denoiser, predict, refused

OURS = ("weight_packed", "weight_scale", "input_scale", "input_zero_point")


@dataclass
class Case:
    """A family's float denoiser and its packed one, on disk and in memory. Not to be written to."""

    family: str
    teacher: Path  # of the pipeline
    folder: Path  # of the packed denoiser
    model: Any

    @property
    def config(self) -> FBQATConfig:
        return FBQATConfig(module_overrides=FAMILIES[self.family].activation_overrides)

    def load(self, **options: Any) -> Any:
        """The packed denoiser."""
        return type(self.model).from_pretrained(self.folder, **options)

    def quantize(self, **options: Any) -> Any:
        """The float denoiser, quantized as it is loaded."""
        options = {"quantization_config": self.config, **options}
        return type(self.model).from_pretrained(self.teacher, subfolder="transformer", **options)

    def float_model(self, **options: Any) -> Any:
        return type(self.model).from_pretrained(self.teacher, subfolder="transformer", **options)

    def predict(self, model: Any) -> Tensor:
        return predict(model, self.family)

    def same(self, model: Any) -> bool:
        """The prediction, to the bit."""
        return torch.equal(self.predict(model), self.predict(self.model))


@pytest.fixture(scope="module", params=MOST_FAMILIES)
def case(request: pytest.FixtureRequest, teacher_of: Callable[[str], Path], tmp_path_factory) -> Case:
    model = pack_denoiser(load_pipeline(teacher_of(request.param)), request.param)
    folder = tmp_path_factory.mktemp("packed") / request.param
    model.save_pretrained(folder)
    return Case(request.param, teacher_of(request.param), folder, model)


def ours(model: nn.Module) -> dict[str, Tensor]:
    """Codes and scales."""
    return {name: value for name, value in model.state_dict().items() if name.endswith(OURS)}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.cell("from_pretrained")
def test_a_folder_is_loaded_exactly(case: Case) -> None:
    loaded = case.load()
    assert same_tensors(loaded.state_dict(), case.model.state_dict())
    assert case.same(loaded)


@pytest.mark.cell("from_pretrained(quantization_config=)")
def test_quantized_on_load_is_the_same(case: Case) -> None:
    loaded = case.quantize()
    assert same_tensors(loaded.state_dict(), case.model.state_dict())
    assert case.same(loaded)


@pytest.mark.cell("get_memory_footprint")
def test_it_takes_less_memory(case: Case) -> None:
    """By as many bytes as float32 has more than half a byte per weight and the scales."""
    original = case.float_model()
    weights = sum(layer.weight.numel() for layer in quantizable(original).values())
    scales = sum(layer.weight_scale.numel() for _, layer in named_layers(case.model, PackedLayer))
    saved = original.get_memory_footprint() - case.model.get_memory_footprint()
    assert saved == 4 * weights - weights // 2 - 4 * scales


@pytest.mark.cell("modules_to_not_convert")
def test_layers_are_left_in_float(case: Case, tmp_path: Path) -> None:
    left, *packed = quantizable(case.float_model())
    config = case.config
    config.modules_to_not_convert = [left]
    model = case.quantize(quantization_config=config)
    assert type(model.get_submodule(left)) in (nn.Linear, nn.Conv2d)
    assert [name for name, _ in named_layers(model, PackedLayer)] == packed
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(case.predict(again), case.predict(model))


# dtypes


@pytest.mark.cell("from_pretrained(dtype=)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_of_all_but_codes_and_scales(case: Case, dtype: torch.dtype) -> None:
    for loaded in (case.load(dtype=dtype), case.quantize(dtype=dtype)):
        assert loaded.dtype == dtype
        assert same_tensors(ours(loaded), ours(case.model))
        rest = {name: value for name, value in loaded.state_dict().items() if not name.endswith(OURS)}
        assert {value.dtype for value in rest.values()} == {dtype}
        wanted, found = case.predict(case.model), case.predict(loaded)
        assert found.dtype == dtype
        assert (found.float() - wanted).square().mean() < 0.01 * wanted.square().mean()


@pytest.mark.cell("to(dtype), half(), float()")
@pytest.mark.parametrize("call", ["to", "to(dtype=)", "half", "float"])
def test_a_cast_is_refused_and_changes_nothing(case: Case, call: str, record_property) -> None:
    """As of every quantized model of diffusers; ``dtype`` of ``from_pretrained`` is the way (docs/format.md)."""
    loaded = case.load()
    casts: dict[str, Callable[[], object]] = {
        "to": lambda: loaded.to(torch.float16),
        "to(dtype=)": lambda: loaded.to(device="cpu", dtype=torch.float16),
        "half": loaded.half,
        "float": loaded.float,
    }
    with refused("unsupported|not supported", record_property):
        casts[call]()
    assert same_tensors(loaded.state_dict(), case.model.state_dict())
    assert loaded.to("cpu") is loaded


@pytest.mark.cell("keep_in_fp32_modules")
def test_what_a_class_keeps_in_fp32_stays_so(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of these classes names modules; the first block's are named here. Packed layers among them stay packed."""
    block = FAMILIES[case.family].blocks(case.model)[0]
    kept = block.partition(".")[0]
    monkeypatch.setattr(type(case.model), "_keep_in_fp32_modules", [kept])
    for loaded in (case.load(dtype=torch.bfloat16), case.quantize(dtype=torch.bfloat16)):
        assert same_tensors(ours(loaded), ours(case.model))
        for name, value in loaded.named_parameters():
            if value.is_floating_point():
                assert value.dtype == (torch.float32 if kept in name.split(".") else torch.bfloat16), name
        for name, layer in named_layers(loaded, PackedLayer):
            assert layer.weight.dtype == (torch.float32 if kept in name.split(".") else torch.bfloat16), name


# places


@pytest.mark.cell("device_map, offload_folder")
@pytest.mark.parametrize("device_map", ["cpu", "auto", "auto, a third of it on disk", "disk", "blocks on disk"])
def test_device_maps(case: Case, device_map: str, tmp_path: Path) -> None:
    stack = FAMILIES[case.family].stacks[0]
    parts = [name for name, _ in [*case.model.named_children(), *case.model.named_parameters(recurse=False)]]
    options: dict[str, dict[str, Any]] = {
        "cpu": {"device_map": "cpu"},
        "auto": {"device_map": "auto"},
        "auto, a third of it on disk": {
            "device_map": "auto",
            "max_memory": {"cpu": case.model.get_memory_footprint() * 2 // 3},
        },
        "disk": {"device_map": {"": "disk"}},
        "blocks on disk": {"device_map": {name: "disk" if name == stack else "cpu" for name in parts}},
    }
    loaded = case.load(offload_folder=tmp_path / "disk", **options[device_map])
    assert ("disk" in {str(place) for place in loaded.hf_device_map.values()}) == ("disk" in device_map)
    assert case.same(loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_automatic_device_maps_count_the_bytes_that_there_are(case: Case, dtype: torch.dtype) -> None:
    model = case.load(dtype=dtype)
    quantizer = FBQATDiffusersQuantizer(model.config.quantization_config, pre_quantized=True)
    with torch.device("meta"):
        empty = type(model).from_config(case.float_model().config).to(dtype)
    quantizer.maybe_update_loaded_keys(list(model.state_dict()), [])
    quantizer.preprocess_model(empty)
    special = quantizer.get_special_dtypes_update(empty, dtype)
    sizes = compute_module_sizes(empty, quantizer.adjust_target_dtype(dtype), special)
    for name, layer in named_layers(model, PackedLayer):
        assert sizes[name] == sum(value.nbytes for value in layer.state_dict().values()), name


@pytest.mark.cell("save_pretrained(max_shard_size=)")
def test_shards(case: Case, tmp_path: Path) -> None:
    case.model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = type(case.model).from_pretrained(tmp_path)
    assert same_tensors(loaded.state_dict(), case.model.state_dict())
    assert case.same(loaded)


@pytest.mark.cell("dequantize, then save and load")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_is_a_float_checkpoint(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    model = case.load(dtype=dtype)
    name, layer = next(named_layers(model, PackedLayer))
    weight = layer.dequantize().reshape(layer.weight.shape)
    model.dequantize()
    assert torch.equal(model.get_submodule(name).weight, weight.to(dtype))
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert case.predict(model).isfinite().all()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert not list(named_layers(loaded, PackedLayer))
    assert same_tensors(loaded.state_dict(), model.state_dict())


# one file


def from_file(case: Case, folder: Path, configs: Path, **options: Any) -> Any:
    if not hasattr(type(case.model), "from_single_file"):
        pytest.skip("not in diffusers")
    (file,) = folder.glob("*.safetensors")
    return type(case.model).from_single_file(str(file), config=str(configs), **options)


@pytest.mark.cell("from_single_file(quantization_config=)")
def test_a_single_file_is_quantized(case: Case, tmp_path: Path) -> None:
    folder = case.teacher / "transformer"
    loaded = from_file(case, folder, case.teacher, subfolder="transformer", quantization_config=case.config)
    assert same_tensors(loaded.state_dict(), case.model.state_dict())
    loaded.save_pretrained(tmp_path)
    assert case.same(type(loaded).from_pretrained(tmp_path))


@pytest.mark.cell("from_single_file of packed weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_single_file_is_read_by_the_config_of_its_folder(case: Case, dtype: torch.dtype) -> None:
    loaded = from_file(case, case.folder, case.folder, dtype=dtype)
    assert same_tensors(loaded.state_dict(), case.load(dtype=dtype).state_dict())
    assert loaded.config.quantization_config.to_dict() == case.load().config.quantization_config.to_dict()


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"quantization_config": FBQATConfig()}])
def test_a_packed_single_file_needs_its_own_config(case: Case, options: dict[str, Any]) -> None:
    if not hasattr(type(case.model), "from_single_file"):
        return
    with refused("packed already, and says nothing of how: leave out quantization_config, and give config="):
        from_file(case, case.folder, case.teacher, subfolder="transformer", **options)
    with refused("is that of a packed model, and the file is not packed"):
        from_file(case, case.teacher / "transformer", case.folder)
