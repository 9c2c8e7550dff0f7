"""What a user does with a pipeline works on a packed one, every family: counted, fused, offloaded, compiled, saved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, remove_hook_from_module
from diffusers import (
    DiffusionPipeline,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
    SanaTransformer2DModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from safetensors.torch import load_file
from torch import nn

from fbqat_hub import FBQATConfig
from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import (
    ActivationScheme,
    PackedLayer,
    PackedLinear,
    WeightScheme,
    convert,
    named_layers,
    prepare,
)
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import MOST_FAMILIES
from tests.integrations.tiny import layers_of, pack_denoiser, predict, refused


@pytest.fixture(params=MOST_FAMILIES)
def packed(request: pytest.FixtureRequest, teacher_of: Callable[[str], Path]) -> tuple[str, Any]:
    """A family and its tiny pipeline, the denoiser packed."""
    pipeline = load_pipeline(teacher_of(request.param))
    pack_denoiser(pipeline, request.param)
    return request.param, pipeline


@pytest.mark.cell("num_parameters")
def test_parameters_are_counted_as_of_the_float_model(packed, teacher_of) -> None:
    family, pipeline = packed
    original = load_pipeline(teacher_of(family)).transformer
    model = pipeline.transformer
    assert model.num_parameters() == original.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == original.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < original.num_parameters()
    for kind in (nn.Linear, nn.Conv2d):
        counts = [sum(isinstance(module, kind) for module in each.modules()) for each in (original, model)]
        assert counts[0] == counts[1]


def names_of_fused(model: Any) -> set[str]:
    fused = ("to_qkv", "to_kv", "to_added_qkv")
    return {name for name, module in model.named_modules() if name.rpartition(".")[2] in fused and module is not None}


@pytest.mark.cell("fuse_qkv_projections")
def test_fused_projections_are_exact(packed, teacher_of, tmp_path: Path, record_property) -> None:
    family, pipeline = packed
    model, original = pipeline.transformer, load_pipeline(teacher_of(family)).transformer
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip("not in diffusers")
    before, tensors = predict(model, family), set(model.state_dict())
    if family == "sd3":
        with refused("not possible with dual_attention_layers and qk_norm", record_property):
            model.fuse_qkv_projections()
        return
    original.fuse_qkv_projections()
    model.fuse_qkv_projections()
    assert names_of_fused(model) == names_of_fused(original)
    assert torch.equal(predict(model, family), before)
    assert all(type(model.get_submodule(name)) is PackedLinear for name in names_of_fused(model))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == tensors
    assert torch.equal(predict(type(model).from_pretrained(tmp_path), family), before)
    model.unfuse_qkv_projections()
    assert torch.equal(predict(model, family), before)
    if not names_of_fused(original):
        pytest.skip("not in diffusers")


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_fused_projections_of_sd3(qk_norm: str | None, teacher_of: Callable[[str], Path]) -> None:
    original = load_pipeline(teacher_of("sd3")).transformer
    single = type(original).from_config({**original.config, "dual_attention_layers": [], "qk_norm": qk_norm})
    prepare(single, WeightScheme(), ActivationScheme())
    convert(single)
    before = predict(single, "sd3")
    if qk_norm:  # diffusers' processor leaves it out, without a word
        with pytest.raises(ValueError, match="not possible with qk_norm"):
            single.fuse_qkv_projections()
        return
    single.fuse_qkv_projections()
    assert torch.equal(predict(single, "sd3"), before)


@pytest.mark.cell("set_attn_processor")
def test_attention_processors_stay_what_they_are(packed, teacher_of) -> None:
    family, pipeline = packed
    model, original = pipeline.transformer, load_pipeline(teacher_of(family)).transformer
    if not hasattr(original, "attn_processors"):
        pytest.skip("not in diffusers")
    before = predict(model, family)
    assert {name: type(each) for name, each in model.attn_processors.items()} == {
        name: type(each) for name, each in original.attn_processors.items()
    }
    model.set_attn_processor({name: copy.deepcopy(each) for name, each in model.attn_processors.items()})
    assert torch.equal(predict(model, family), before)


@pytest.fixture
def attention_backend() -> Iterator[None]:
    """What ``set_attention_backend`` sets for all models is set back."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.usefixtures("attention_backend")
@pytest.mark.cell("set_attention_backend")
def test_attention_backends(packed) -> None:
    """Those of torch, which run on a CPU."""
    family, pipeline = packed
    model = pipeline.transformer
    processors = [getattr(module, "processor", None) for module in model.modules()]
    if not any(hasattr(each, "_attention_backend") for each in processors):
        pytest.skip("not in diffusers")
    before = predict(model, family)
    for backend in ("native", "_native_math", "_native_flash"):
        model.set_attention_backend(backend)
        chosen = {each._attention_backend for each in processors if hasattr(each, "_attention_backend")}
        assert chosen == {AttentionBackendName(backend)}
        # another order of sums moves an activation over a rounding threshold
        torch.testing.assert_close(predict(model, family), before, rtol=0.02, atol=0.02)
    model.reset_attention_backend()
    assert torch.equal(predict(model, family), before)


@pytest.mark.cell("enable_layerwise_casting")
def test_layerwise_casting_leaves_codes_and_scales(packed, teacher_of) -> None:
    """What is cast is what of a float model is; but codes and scales stay as they are."""
    family, pipeline = packed
    model, original = pipeline.transformer, load_pipeline(teacher_of(family)).transformer
    stored = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {name for name, value in model.state_dict().items() if value.dtype != stored[name].dtype}
    original.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    floats = {name for name, value in original.state_dict().items() if value.dtype == torch.float8_e4m3fn}
    assert cast == floats & stored.keys()
    assert any(name.endswith(".bias") for name in cast) or family == "flux2-klein"  # which has no biases
    predicted = predict(model, family)
    for name, value in model.state_dict().items():
        assert value.dtype == (torch.float8_e4m3fn if name in cast else stored[name].dtype), name
        if name not in cast:
            assert torch.equal(value, stored[name]), name
    rounded = {name: v.to(torch.float8_e4m3fn).float() if name in cast else v for name, v in stored.items()}
    plain = type(model).from_config(model.config)
    prepare(plain, WeightScheme(), ActivationScheme(), overrides=FAMILIES[family].activation_overrides)
    convert(plain)
    plain.load_state_dict(rounded)
    assert torch.equal(predicted, predict(plain.eval(), family))


OFFLOADS: dict[str, dict[str, Any]] = {
    "leaf_level": {},
    "block_level": {"num_blocks_per_group": 1},
    "low_cpu_mem_usage": {"offload_type": "leaf_level", "low_cpu_mem_usage": True},
    "to disk": {"offload_type": "block_level", "num_blocks_per_group": 1},
}


@pytest.mark.cell("enable_group_offload")
@pytest.mark.parametrize("kind", OFFLOADS)
def test_group_offload_is_exact(packed, kind: str, tmp_path: Path) -> None:
    """On the CPU to the CPU or a disk: the bookkeeping is that of any device."""
    family, pipeline = packed
    model = pipeline.transformer
    before = predict(model, family)
    device = torch.device("cpu")
    options = {"offload_type": kind, **OFFLOADS[kind]}
    if kind == "to disk":
        options["offload_to_disk_path"] = str(tmp_path)
    model.enable_group_offload(device, device, **options)
    for _ in range(2):
        assert torch.equal(predict(model, family), before)
    assert bool(list(tmp_path.iterdir())) == (kind == "to disk")


@pytest.mark.cell("enable_model_cpu_offload")
def test_model_offload_is_exact(packed) -> None:
    family, pipeline = packed
    before = predict(pipeline.transformer, family)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert isinstance(pipeline.transformer._hf_hook, CpuOffload)
    assert torch.equal(predict(pipeline.transformer, family), before)
    pipeline.remove_all_hooks()
    assert torch.equal(predict(pipeline.transformer, family), before)


@pytest.mark.cell("enable_sequential_cpu_offload")
@pytest.mark.parametrize("buffers", [False, True])
def test_sequential_offload_is_exact(packed, buffers: bool) -> None:
    """What diffusers does with each model; codes, and scales with ``buffers``, are on the device in a forward only."""
    family, pipeline = packed
    model = pipeline.transformer
    before = predict(model, family)
    cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
    for name, layer in named_layers(model, PackedLayer):
        assert (layer.weight_packed.is_meta, layer.weight_scale.is_meta) == (True, buffers), name
    for _ in range(2):
        assert torch.equal(predict(model, family), before)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(predict(model, family), before)


@pytest.mark.cell("save_pretrained(safe_serialization=False)")
def test_only_safetensors_are_written(packed, tmp_path: Path, record_property) -> None:
    _, pipeline = packed
    for part in (pipeline, pipeline.transformer):
        with refused("saved as safetensors only; leave safe_serialization=True", record_property):
            part.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.cell("quantizing a packed model again, in memory")
def test_a_packed_model_is_not_quantized_again(packed, tmp_path: Path, record_property) -> None:
    _, pipeline = packed
    with refused("quantized already", record_property):
        prepare(pipeline.transformer, WeightScheme(), ActivationScheme())


def test_a_second_config_of_a_packed_folder_is_ignored_with_a_warning(packed_folder: Path) -> None:
    """diffusers does not show it to the quantizer."""
    before = {name: layer.weight_bits for name, layer in layers_of(packed_folder).items()}
    for config in (FBQATConfig(weight_bits=8), GGUFQuantizationConfig(compute_dtype=torch.float32)):
        with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
            model = SanaTransformer2DModel.from_pretrained(
                packed_folder, subfolder="transformer", quantization_config=config
            )
        assert {name: layer.weight_bits for name, layer in named_layers(model, PackedLayer)} == before


def test_a_packed_folder_is_not_converted_again(packed_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantized already|packed already|is packed"):
        convert_pipeline(str(packed_folder), tmp_path / "again")


def test_quant_backend_quantizes_denoiser_and_text_encoder(tiny_sana: Path) -> None:
    config = PipelineQuantizationConfig(
        quant_backend="fbqat",
        quant_kwargs={"weight_bits": 8},
        components_to_quantize=["transformer", "text_encoder"],
    )
    pipeline = DiffusionPipeline.from_pretrained(tiny_sana, quantization_config=config)
    for name in ("transformer", "text_encoder"):
        assert {layer.weight_bits for _, layer in named_layers(getattr(pipeline, name), PackedLayer)} == {8}
    assert not list(named_layers(pipeline.vae, PackedLayer))


def test_quant_backend_that_is_mistyped() -> None:
    with pytest.raises(ValueError, match="quant_backend=fbqta was not found"):
        PipelineQuantizationConfig(quant_backend="fbqta", quant_kwargs={"weight_bits": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": {"bits": 16}}, "activation scheme in common"),
        ({"left": "to_q"}, "cannot be fused into to_qkv: to_q is not packed"),
    ],
)
def test_projections_that_differ_are_not_fused(change: dict[str, Any], message: str, teacher_of) -> None:
    model = load_pipeline(teacher_of("flux")).transformer
    overrides = {"*.attn.to_q": change["q"]} if "q" in change else {}
    left = ["*.attn.to_q"] if "left" in change else []
    prepare(model, WeightScheme(), ActivationScheme(), not_convert=left, overrides=overrides)
    convert(model)
    with pytest.raises(ValueError, match=message):
        model.fuse_qkv_projections()


@pytest.mark.parametrize("bits", [(4, 4, 4), (4, 8, 6)])
@pytest.mark.parametrize("group_size", [None, 8])
@torch.no_grad()
def test_joined_layers_give_the_same(bits: tuple[int, ...], group_size: int | None) -> None:
    torch.manual_seed(0)
    layers: list[PackedLayer] = []
    for index, width in enumerate(bits):
        model = nn.Sequential(nn.Linear(16, 5 + index))
        granularity = "per_group" if group_size else "per_channel"
        scheme = WeightScheme(bits=width, granularity=granularity, group_size=group_size)
        prepare(model, scheme, ActivationScheme())
        convert(model)
        layers.append(model[0])
    x = torch.randn(3, 16)
    joined = PackedLinear.concatenated(layers)
    assert torch.equal(joined.dequantize(), torch.cat([layer.dequantize() for layer in layers]))
    expected = torch.cat([layer(x) for layer in layers], -1)
    if set(bits) == {4} and group_size is None:
        assert torch.equal(joined(x), expected)
    else:  # the reference sums floats, in an order that depends on the number of outputs
        torch.testing.assert_close(joined(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cell("PipelineQuantizationConfig(quant_mapping=)")
def test_quant_mapping(packed, teacher_of) -> None:
    family, pipeline = packed
    config = FBQATConfig(module_overrides=FAMILIES[family].activation_overrides)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    loaded = DiffusionPipeline.from_pretrained(teacher_of(family), quantization_config=mapping, dtype=torch.float32)
    assert torch.equal(predict(loaded.transformer, family), predict(pipeline.transformer, family))
