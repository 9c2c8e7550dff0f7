"""Text encoders through transformers: quantized on load, saved, loaded again, and refused where they must be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fbqat_hub import FBQATConfig, cli
from fbqat_hub.integrations.checkpoint import packed_layers
from fbqat_hub.integrations.transformers import NOTICE
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.quantization.convert import quantizable
from fbqat_hub.quantization.packing import pack
from fbqat_hub.quantization.quantize import quantize_weight
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import load_recipe
from tests.conftest import MOST_FAMILIES, ROOT, call_of, edit_tensors, subprocess_environment

_TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {**_TINY, "num_key_value_heads": 1, "head_dim": 8}
_T5 = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
# class -> settings of its config, and how many of its layers are quantized
ENCODERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "T5EncoderModel": ("T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}, 14),
    "CLIPTextModel": ("CLIPTextConfig", {**_TINY, "bos_token_id": 1, "eos_token_id": 2}, 12),
    "CLIPTextModelWithProjection": (
        "CLIPTextConfig",
        {**_TINY, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 8},
        13,
    ),
    "Gemma2Model": ("Gemma2Config", _DECODER, 14),
    "Qwen3Model": ("Qwen3Config", _DECODER, 14),
    "Qwen3ForCausalLM": ("Qwen3Config", {**_DECODER, "tie_word_embeddings": True}, 14),
}
# name -> config, and the largest error of the output that the encoders above are allowed, over its norm
WIDTHS = {
    "W8A8": (FBQATConfig(weight_bits=8), 0.03),
    "W4A8": (FBQATConfig(), 0.3),
    "W4": (FBQATConfig(activation_bits=32), 0.3),
}
TOKENS = torch.arange(3, 11)[None]


def made(name: str) -> Any:
    config, settings, _ = ENCODERS[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


@torch.no_grad()
def output(model: Any) -> Tensor:
    return model(TOKENS)[0]


@pytest.fixture(scope="module", params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, int]:
    """A float text encoder, its folder, and how many layers it has to quantize."""
    model = made(request.param)
    folder = tmp_path_factory.mktemp("encoder") / request.param
    model.save_pretrained(folder)
    return model, folder, ENCODERS[request.param][2]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a float T5. Not to be written to."""
    folder = tmp_path_factory.mktemp("t5") / "float"
    made("T5EncoderModel").save_pretrained(folder)
    return folder


@pytest.fixture
def packed_t5(t5: Path, tmp_path: Path) -> Path:
    """Folder of a packed T5."""
    model = transformers.T5EncoderModel.from_pretrained(t5, quantization_config=FBQATConfig(weight_bits=8))
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_on_load_save_and_load_again(encoder, width: str, tmp_path: Path) -> None:
    model, folder, count = encoder
    config, largest = WIDTHS[width]
    packed = type(model).from_pretrained(folder, quantization_config=config)
    assert len(list(named_layers(packed, PackedLayer))) == count
    wanted = output(packed)
    error = float((wanted - output(model)).norm() / output(model).norm())
    assert 1e-4 < error < largest
    packed.save_pretrained(tmp_path)
    assert not config.modules_to_not_convert, "the caller's config is another model's too"
    again, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(output(again), wanted)


def test_codes_are_those_of_the_one_quantizer(t5: Path, packed_t5: Path) -> None:
    """And from the stored numbers, not from those that the loader cast."""
    weights, packed = load_file(t5 / "model.safetensors"), load_file(packed_t5 / "model.safetensors")
    half = transformers.T5EncoderModel.from_pretrained(
        t5, quantization_config=FBQATConfig(weight_bits=8), dtype=torch.bfloat16
    ).state_dict()
    names = [name.removesuffix(".weight_packed") for name in packed if name.endswith(".weight_packed")]
    assert len(names) == 14
    for name in names:
        codes, scales = quantize_weight(weights[f"{name}.weight"], FBQATConfig(weight_bits=8).weight_scheme())
        for stored in (packed, half):
            assert torch.equal(stored[f"{name}.weight_packed"], pack(codes, 8))
            assert torch.equal(stored[f"{name}.weight_scale"], scales)


def test_a_fresh_process_computes_the_same_to_the_bit(packed_t5: Path, tmp_path: Path) -> None:
    code = (
        "import fbqat_hub, torch; from transformers import T5EncoderModel; from safetensors.torch import save_file;"
        f"model = T5EncoderModel.from_pretrained({str(packed_t5)!r}); torch.set_grad_enabled(False);"
        f"save_file({{'y': model(torch.tensor({TOKENS.tolist()}))[0]}}, {str(tmp_path / 'y.safetensors')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = output(transformers.T5EncoderModel.from_pretrained(packed_t5))
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], wanted)


@pytest.mark.parametrize("kind", ["T5EncoderModel", "AutoModel"])
def test_without_this_package_it_does_not_load(packed_t5: Path, kind: str) -> None:
    """transformers alone would warn, and fill the layers with random numbers."""
    code = f"from transformers import {kind}; {kind}.from_pretrained({str(packed_t5)!r}); print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert done.stderr.rstrip().rpartition("\n")[2].endswith(NOTICE)
    assert "pip install fbqat-hub" in NOTICE


def test_a_config_that_is_saved_alone_keeps_the_notice(packed_t5: Path, tmp_path: Path) -> None:
    transformers.AutoConfig.from_pretrained(packed_t5).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["transformers_weights"] == NOTICE


def test_half_precision_keeps_what_t5_keeps_in_fp32(t5: Path, tmp_path: Path) -> None:
    model = transformers.T5EncoderModel.from_pretrained(t5, quantization_config=FBQATConfig(), dtype=torch.float16)
    model.save_pretrained(tmp_path)
    again = transformers.T5EncoderModel.from_pretrained(tmp_path)
    for each in (model, again):
        dense = each.encoder.block[0].layer[1].DenseReluDense
        assert (dense.wo.weight.dtype, dense.wi_0.weight.dtype) == (torch.float32, torch.float16)
        assert dense.wo.weight_scale.dtype == dense.wi_0.weight_scale.dtype == torch.float32
    assert torch.equal(output(again), output(model))


def test_widths_by_module_and_dequantize(t5: Path, tmp_path: Path) -> None:
    config = FBQATConfig(weight_bits_by_module={"*.wo": 8}, modules_to_not_convert=["*.block.0.*"])
    model = transformers.T5EncoderModel.from_pretrained(t5, quantization_config=config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 2
    assert stored["weight_bits_by_module"] == {"encoder.block.1.layer.1.DenseReluDense.wo": 8}
    assert len(stored["modules_to_not_convert"]) == 7
    again = transformers.T5EncoderModel.from_pretrained(tmp_path)
    wanted = output(transformers.T5EncoderModel.from_pretrained(tmp_path))
    real = again.encoder.block[1].layer[1].DenseReluDense.wo.dequantize()
    again.dequantize()
    assert type(again.encoder.block[1].layer[1].DenseReluDense.wo) is nn.Linear
    assert torch.equal(again.encoder.block[1].layer[1].DenseReluDense.wo.weight, real)
    assert float((output(again) - wanted).norm() / wanted.norm()) < 0.05
    again.save_pretrained(tmp_path / "float")
    assert not {"quantization_config", "transformers_weights"} & set(
        json.loads((tmp_path / "float" / "config.json").read_text())
    )


def test_shards_and_a_device_map(packed_t5: Path, tmp_path: Path) -> None:
    model = transformers.T5EncoderModel.from_pretrained(packed_t5)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "shards", device_map={"": "cpu"})
    assert torch.equal(output(again), output(model))
    (lost, *_) = sorted((tmp_path / "shards").glob("*.safetensors"))
    lost.unlink()
    with pytest.raises((ValueError, OSError), match=lost.name):
        transformers.T5EncoderModel.from_pretrained(tmp_path / "shards")


def test_an_adapter_on_a_packed_encoder(packed_t5: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.T5EncoderModel.from_pretrained(packed_t5)
    plain = output(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
    adapted = output(model)
    assert not torch.equal(adapted, plain)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    with pytest.raises(ValueError, match="dequantize is not possible with an adapter"):
        model.dequantize()
    other = transformers.T5EncoderModel.from_pretrained(packed_t5)
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(other), adapted)
    model.delete_adapter("default")


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight_scale"]


def squeeze(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight_scale"] = torch.ones(3)


def break_scale(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight_scale"][0] = float("nan")


def break_norm(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.final_layer_norm.weight"][0] = float("inf")


def cast(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight_packed"] = torch.zeros(16, 16)


def add(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.block.9.layer.0.SelfAttention.q.weight_scale"] = torch.ones(16)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, r"not a whole packed checkpoint of a T5EncoderModel: missing tensors: .*SelfAttention.q.weight_scale"),
        (squeeze, r"SelfAttention.q.weight_scale has shape \(3,\); this model needs \(16,\)"),
        (break_scale, r"SelfAttention.q.weight_scale has scales that are not finite"),
        (break_norm, r"final_layer_norm.weight has values that are not finite"),
        (cast, r"SelfAttention.q.weight_packed is torch.float32; docs/format.md has torch.int8"),
        (add, r"extra tensors: encoder.block.9"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(packed_t5: Path, edit: Callable[..., Any], message: str) -> None:
    edit_tensors(packed_t5 / "model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        transformers.T5EncoderModel.from_pretrained(packed_t5)


def test_the_notice_of_another_version_is_no_obstacle(packed_t5: Path) -> None:
    config = json.loads((packed_t5 / "config.json").read_text())
    config["transformers_weights"] = "another sentence"
    (packed_t5 / "config.json").write_text(json.dumps(config))
    assert transformers.T5EncoderModel.from_pretrained(packed_t5).is_quantized


def test_a_newer_format_is_refused(packed_t5: Path) -> None:
    config = json.loads((packed_t5 / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (packed_t5 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"format_version 99.*Update with: pip install -U fbqat_hub"):
        transformers.T5EncoderModel.from_pretrained(packed_t5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_range": "static"}, "'static', which quantize-on-load cannot calibrate"),
        ({"average_bits": 4.5}, "average_bits chooses widths for denoisers"),
        ({"modules_to_not_convert": ["*.to_q"]}, r"pattern '\*.to_q' matches no linear layer"),
    ],
)
def test_a_config_that_does_not_suit_is_refused(t5: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformers.T5EncoderModel.from_pretrained(t5, quantization_config=FBQATConfig(**settings))


def test_a_transformers_that_is_too_old_is_refused(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbqat_hub.integrations.transformers._TRANSFORMERS", "99.0")
    with pytest.raises(ImportError, match=r"transformers>=99.0 is required(.|\n)*pip install -U transformers"):
        transformers.T5EncoderModel.from_pretrained(t5, quantization_config=FBQATConfig())


def test_float_weights_that_are_not_finite_are_refused_by_name(t5: Path, tmp_path: Path) -> None:
    transformers.T5EncoderModel.from_pretrained(t5).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model.safetensors: encoder.block.0.layer.0.SelfAttention.q.weight has values"
    ):
        transformers.T5EncoderModel.from_pretrained(tmp_path, quantization_config=FBQATConfig())


def pictures(pipeline: Any, family: str) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(3)
    return pipeline(prompt="dark red", generator=random, output_type="pt", **call_of(family, pipeline)).images


@pytest.mark.parametrize("family", MOST_FAMILIES)
def test_one_call_loads_a_whole_small_pipeline(family: str, teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Denoiser at 4 bits, every text encoder at 8: by ``fbqat convert``, and by diffusers' own configuration."""
    source = teacher_of(family)
    assert cli.main(["convert", str(source), "--output", str(tmp_path / "small"), "--text-encoders", "w8a8"]) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "small")
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    assert encoders
    for encoder in encoders:
        layers = dict(named_layers(encoder, PackedLayer))
        assert {layer.weight_bits for layer in layers.values()} == {8}
        assert not quantizable(encoder)
        for name, layer in layers.items():
            assert layer.activation_bits == (32 if name.endswith(".wo") else 8)
    picture = pictures(pipeline, family)
    assert torch.equal(pictures(load_pipeline(tmp_path / "small"), family), picture)
    plain = pictures(DiffusionPipeline.from_pretrained(convert_pipeline(str(source), tmp_path / "plain")), family)
    assert 0 < float((picture - plain).abs().mean()) < 0.02
    assert load_recipe(tmp_path / "small" / "recipe.yaml").text_encoders == "w8a8"

    own = {name: FBQATConfig(weight_bits=8) for name in pipeline.components if name.startswith("text_encoder")}
    mapping = PipelineQuantizationConfig(quant_mapping=own)
    loaded = DiffusionPipeline.from_pretrained(source, quantization_config=mapping)
    assert all(list(named_layers(getattr(loaded, name), PackedLayer)) for name in own)


def test_the_page_runs(teacher_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"source": teacher_of("flux")}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "text-encoders.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert list(named_layers(getattr(names["pipeline"], name), PackedLayer))


def test_quantized_encoders_are_not_quantized_again(
    tiny_sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = load_pipeline(tiny_sana)
    pipeline.save_pretrained(tmp_path / "half")
    encoder = transformers.Gemma2Model.from_pretrained(
        tmp_path / "half" / "text_encoder", quantization_config=FBQATConfig()
    )
    encoder.save_pretrained(tmp_path / "half" / "text_encoder")
    command = ["convert", str(tmp_path / "half"), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--text-encoders", "w8a8"]) == 1
    assert "text_encoder is quantized already; give a pipeline with full-prec" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(command) == 0
    assert list(named_layers(load_pipeline(tmp_path / "out").text_encoder, PackedLayer))


def test_card_says_what_the_encoders_are(tiny_sana: Path, tmp_path: Path) -> None:
    run = convert_pipeline(str(tiny_sana), tmp_path / "run", text_encoders="w4")
    assert cli.main(["evaluate", str(run), "--metrics", "bits_per_weight"]) == 0
    assert cli.main(["card", str(run)]) == 0
    card = (run / "README.md").read_text()
    assert re.search(r"The text encoders have 4-bit weights and float activations", card)
    assert "text_encoders: w4" in card


def test_a_whole_flux_is_at_most_ten_gigabytes() -> None:
    """FLUX.1-schnell's shapes, bf16 against W4A8 with 4-bit text encoders whose ``wo`` have 8."""
    t5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    decoder = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2}
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    with torch.device("meta"):
        parts: dict[str, tuple[nn.Module, FBQATConfig | None]] = {
            "transformer": (FluxTransformer2DModel(), FBQATConfig()),
            "text_encoder": (
                transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip, vocab_size=49408)),
                FBQATConfig(activation_bits=32),
            ),
            "text_encoder_2": (
                transformers.T5EncoderModel(transformers.T5Config(**t5, feed_forward_proj="gated-gelu")),
                FBQATConfig(activation_bits=32, weight_bits_by_module={"*.wo": 8}),
            ),
            "vae": (AutoencoderKL(**decoder, **blocks), None),
        }
    in_bf16 = sum(2 * each.numel() for model, _ in parts.values() for each in model.parameters())
    stored = 0
    for model, config in parts.values():
        if config:
            for name, layer in packed_layers(model, config).items():
                model.set_submodule(name, layer)
        tensors = {id(each): each for each in [*model.parameters(), *model.buffers()]}.values()
        scales = [layer.weight_scale.nbytes for _, layer in named_layers(model, PackedLayer)]
        stored += sum(scales)
        stored += sum((2 if each.is_floating_point() else 1) * each.numel() for each in model.parameters())
        assert len(tensors) >= len(scales)
    assert 33e9 < in_bf16 < 34e9
    assert 9e9 < stored < 10e9
