"""A whole tiny Sana of random weights and a few captioned pictures, made in seconds without a network."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from PIL import Image
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from fbqat_hub.integrations.diffusers import save_pipeline
from fbqat_hub.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = [
    "red",
    "green",
    "blue",
    "dark red",
    "dark green",
    "dark blue",
    "pink",
    "mint",
    "sky",
    "black",
    "grey",
    "white",
]
# what the pipeline is asked to draw: 32 x 32 pixels from 4 x 4 latents
CALL = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}


def subprocess_environment(**changes: str) -> dict[str, str]:
    """Of a fresh process that finds this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


@pytest.fixture(scope="session", autouse=True)
def fbqat_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that a test encodes lands in, or comes from, the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBQAT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a float SanaPipeline of true classes; 27 layers can be quantized. Not to be written to."""
    torch.manual_seed(0)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"])}
    vocabulary.update({letter: len(vocabulary) + index for index, letter in enumerate(string.ascii_lowercase)})
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(vocabulary),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            attn_implementation="eager",
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=4,
        patch_size=1,
        interpolation_scale=1.0,
    )
    stages: dict[str, Any] = {
        "block_types": "ResBlock",
        "block_out_channels": (8, 8, 8, 8),
        "qkv_multiscales": ((),) * 4,
    }
    autoencoder = AutoencoderDC(
        latent_channels=4,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in stages.items()},
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        scaling_factor=0.5,
    )
    pipeline = SanaPipeline(
        tokenizer=GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=32),
        text_encoder=text_encoder.eval(),
        vae=autoencoder.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    folder = tmp_path_factory.mktemp("teacher") / "tiny-sana"
    save_pipeline(pipeline, folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioned imagefolder of 12 coloured squares, without validation and test splits."""
    folder = tmp_path_factory.mktemp("data") / "squares"
    (folder / "train").mkdir(parents=True)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        picture = Image.linear_gradient("L").resize((32, 32)).rotate(30 * index).convert("RGB")
        picture.paste((20 * index, 250 - 20 * index, 128), (4, 4, 28, 28))
        picture.save(folder / "train" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "caption": caption}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def recipe_fields(tiny_sana: Path, pictures: Path, fbqat_cache: Path) -> dict[str, Any]:
    """A recipe of six steps on the tiny Sana and the squares."""
    return {
        "name": "Tiny-FBQAT-W4A8",
        "family": "sana",
        "teacher": str(tiny_sana),
        "method": "fbqat",
        "dataset": {"path": str(pictures), "cache_dir": str(fbqat_cache / "datasets")},
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "save_every": 2,
        "evaluation": {"images": 4, "inference_steps": 2, "draws": 1, "batch_size": 4},
        "generation": dict(CALL),
    }


@pytest.fixture(scope="session")
def run_folder(recipe_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of that recipe. Not to be written to."""
    from fbqat_hub.training.distill import train

    return train(Recipe(**recipe_fields), tmp_path_factory.mktemp("runs") / "tiny", progress=False)


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """A recipe file of exactly these fields."""
    path.write_text(yaml.safe_dump(recipe))
    return path
