"""Every family through diffusers: quantized as it is loaded, saved, loaded again, the same picture to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file
from torch import Tensor

from fbqat_hub import FBQATConfig
from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers, stored_bits_per_weight
from fbqat_hub.quantization.convert import matches, quantizable
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import load_recipe
from tests.conftest import MOST_FAMILIES, call_of


def draw(pipeline: Any, family: str) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(3)
    return pipeline(prompt="dark red", generator=random, output_type="pt", **call_of(family, pipeline)).images


@pytest.fixture(scope="module", params=MOST_FAMILIES)
def converted(request: pytest.FixtureRequest, teacher_of: Callable[[str], Path], tmp_path_factory) -> tuple[str, Path]:
    """A family, and the folder that ``convert_pipeline`` made of its pipeline."""
    output = tmp_path_factory.mktemp("converted") / request.param
    return request.param, convert_pipeline(str(teacher_of(request.param)), output)


def test_quantize_on_load_save_and_load_again(converted, teacher_of, tmp_path: Path) -> None:
    """By diffusers' own ways only; the same tensors as ``convert_pipeline``'s."""
    family, folder = converted
    config = FBQATConfig(module_overrides=FAMILIES[family].activation_overrides)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipeline = DiffusionPipeline.from_pretrained(teacher_of(family), quantization_config=mapping, dtype=torch.float32)
    pipeline.save_pretrained(tmp_path)
    weights = Path("transformer/diffusion_pytorch_model.safetensors")
    assert (tmp_path / weights).read_bytes() == (folder / weights).read_bytes()
    picture = draw(pipeline, family)
    assert picture.shape == (1, 3, 32, 32)
    assert picture.std() > 0.01
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(tmp_path), family), picture)


def test_every_linear_layer_is_packed_two_weights_to_a_byte(converted, teacher_of) -> None:
    """32 bits of scale an output channel, and half a byte per weight."""
    family, folder = converted
    layers = quantizable(load_pipeline(teacher_of(family)).transformer)
    transformer = load_pipeline(folder).transformer
    packed = dict(named_layers(transformer, PackedLayer))
    assert list(packed) == list(layers)
    weights, channels = (sum(math.prod(layer.weight.shape[:n]) for layer in layers.values()) for n in (2, 1))
    assert stored_bits_per_weight(transformer) == pytest.approx(4 + 32 * channels / weights)
    tensors = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert sum(value.nbytes for name, value in tensors.items() if name.endswith("weight_packed")) == weights / 2
    wide = {name for name, layer in packed.items() if layer.activation_bits == 16}
    assert wide == {name for name in layers if matches(name, FAMILIES[family].activation_overrides)}
    assert wide


@torch.no_grad()
def test_picture_is_near_the_float_one(converted, teacher_of) -> None:
    family, folder = converted
    original, packed = draw(load_pipeline(teacher_of(family)), family), draw(load_pipeline(folder), family)
    error = (packed - original).square().mean() / original.var()
    assert 1e-7 < error < 0.1


def test_conversion_says_what_it_made(converted, teacher_of) -> None:
    family, folder = converted
    recipe = load_recipe(folder / "recipe.yaml")
    assert (recipe.family, recipe.method, recipe.teacher) == (family, "ptq-mse", str(teacher_of(family)))
    assert recipe.generation == FAMILIES[family].own_call(load_pipeline(folder))
    assert recipe.evaluation.inference_steps == FAMILIES[family].sampler_steps(recipe.generation)
    assert DiffusionPipeline.load_config(folder)["_class_name"] == FAMILIES[family].pipeline_class


def test_a_third_text_encoder_can_be_left_out(teacher_of, tmp_path: Path) -> None:
    """SD3.5 without its T5, as diffusers' own documentation has it for small memory; diffusers has to be told again."""
    without = {"text_encoder_3": None, "tokenizer_3": None}
    DiffusionPipeline.from_pretrained(teacher_of("sd3"), **without).save_pretrained(tmp_path / "float")
    folder = convert_pipeline(str(tmp_path / "float"), tmp_path / "packed")
    pipeline = load_pipeline(folder)
    assert pipeline.text_encoder_3 is None
    assert torch.equal(draw(pipeline, "sd3"), draw(DiffusionPipeline.from_pretrained(folder, **without), "sd3"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(ValueError, match="names no text_encoder_2, which a StableDiffusion3Pipeline needs"):
        load_pipeline(folder)
