"""What a user does with a pipeline works on a packed one, every family: counted, fused, offloaded, compiled, saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file
from torch import Tensor, nn

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
from tests.conftest import SANA_FIRST, TRAINED
from tests.integrations.tiny import denoiser_inputs, pack_denoiser


@pytest.fixture(params=TRAINED)
def packed(request: pytest.FixtureRequest, teacher_of: Callable[[str], Path]) -> tuple[str, Any]:
    """A family and its tiny pipeline, the denoiser packed."""
    pipeline = load_pipeline(teacher_of(request.param))
    pack_denoiser(pipeline, request.param)
    return request.param, pipeline


@torch.no_grad()
def predict(model: Any, family: str) -> Tensor:
    return model(**denoiser_inputs(family, model), return_dict=False)[0]


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


@pytest.mark.cell("fuse_qkv_projections")
def test_fused_projections_are_exact(packed, tmp_path: Path, record_property) -> None:
    """Sana's attention has no fused form in diffusers: nothing changes."""
    family, pipeline = packed
    model = pipeline.transformer
    before, tensors = predict(model, family), set(model.state_dict())
    if family == "sd3":
        with pytest.raises(ValueError, match="not possible with dual_attention_layers and qk_norm"):
            model.fuse_qkv_projections()
        record_property("state", "refused")
        return
    model.fuse_qkv_projections()
    assert torch.equal(predict(model, family), before)
    fused = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("to_qkv", "to_kv")]
    assert bool(fused) == (family != "sana")
    assert all(type(each) is PackedLinear for each in fused)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == tensors
    assert torch.equal(predict(type(model).from_pretrained(tmp_path), family), before)
    model.unfuse_qkv_projections()
    assert torch.equal(predict(model, family), before)


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
    before = predict(model, family)
    assert {name: type(each) for name, each in model.attn_processors.items()} == {
        name: type(each) for name, each in original.attn_processors.items()
    }
    model.set_attn_processor({name: copy.deepcopy(each) for name, each in model.attn_processors.items()})
    assert torch.equal(predict(model, family), before)


@pytest.mark.cell("group offload")
def test_group_offload_is_exact(packed) -> None:
    """On the CPU to the CPU: the bookkeeping is that of any device."""
    family, pipeline = packed
    model = pipeline.transformer
    before = predict(model, family)
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="leaf_level")
    assert torch.equal(predict(model, family), before)


@pytest.mark.cell("save_pretrained(safe_serialization=False): an error")
def test_only_safetensors_are_written(packed, tmp_path: Path) -> None:
    _, pipeline = packed
    for part in (pipeline, pipeline.transformer):
        with pytest.raises(ValueError, match="saved as safetensors only; leave safe_serialization=True"):
            part.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.cell("quantizing twice: an error")
def test_a_packed_model_is_not_quantized_again(packed, tmp_path: Path) -> None:
    _, pipeline = packed
    with pytest.raises(ValueError, match="quantized already"):
        prepare(pipeline.transformer, WeightScheme(), ActivationScheme())


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


@pytest.mark.cell("compile(fullgraph=True) with a LoRA")
@pytest.mark.parametrize("family", SANA_FIRST)
def test_a_model_with_an_adapter_is_one_graph(family: str, teacher_of) -> None:
    from peft import LoraConfig, get_peft_model

    torch._dynamo.reset()
    model = pack_denoiser(load_pipeline(teacher_of(family)), family)
    inputs = denoiser_inputs(family, model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "conv_point"], init_lora_weights=False))
    expected = predict(model, family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], expected)
    torch._dynamo.reset()


@pytest.mark.cell("PipelineQuantizationConfig(quant_mapping=)")
def test_quant_mapping(packed, teacher_of) -> None:
    family, pipeline = packed
    config = FBQATConfig(module_overrides=FAMILIES[family].activation_overrides)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    loaded = DiffusionPipeline.from_pretrained(teacher_of(family), quantization_config=mapping, dtype=torch.float32)
    assert torch.equal(predict(loaded.transformer, family), predict(pipeline.transformer, family))
