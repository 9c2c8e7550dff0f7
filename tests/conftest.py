"""Whole tiny pipelines of random weights and a few captioned pictures, made in seconds without a network."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

if not torch.cuda.is_available():  # asked by Triton when it is imported; whoever imports it first
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fbqat_hub.families import FAMILIES, Family, component_configs
from fbqat_hub.pipelines import load_pipeline, save_pipeline

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
# what the tiny Sana is asked to draw: 32 x 32 pixels from 4 x 4 latents
CALL = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}
_CLIP = {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8, "num_hidden_layers": 1}
_QWEN = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
# class -> what it has less of than in the teachers' recipes
SMALL: dict[str, dict[str, Any]] = {
    "AutoencoderDC": {
        "latent_channels": 4,
        **{f"{part}_block_out_channels": [8, 8, 8, 8] for part in ("encoder", "decoder")},
        **{f"{part}_layers_per_block": [0, 1, 1, 1] for part in ("encoder", "decoder")},
        "scaling_factor": 0.5,
    },
    "AutoencoderKL": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "scaling_factor": 0.5},
    "Gemma2Model": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1},
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 8,
        "sample_size": 4,
    },
    "PixArtTransformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
    },
    "SD3Transformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "sample_size": 8,
        "pos_embed_max_size": 8,
        "dual_attention_layers": [0],
    },
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": [4, 6, 6],
    },
    "Qwen3Model": {**_QWEN, "head_dim": 8},
    "ZImageTransformer2DModel": {
        "dim": 48,  # 48 / 3 * 8 = 128, an even width of the feed-forward
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 8,
    },
}

_FLOW = {"class": "FlowMatchEulerDiscreteScheduler"}
_OF_KL = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
    "shift_factor",
    "scaling_factor",
)
# Pipelines that have no teacher of their own -> the teacher's recipe that they are like, and what is other in theirs;
# of autoencoder and transformer, ... takes a setting away.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sana-1.5": ("sana", {"transformer": {"qk_norm": "rms_norm_across_heads"}}),
    "sana-sprint": (
        "sana",
        {
            "family": "sana-sprint",
            "transformer": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
            "scheduler": {"class": "SCMScheduler", "sigma_data": 0.5},
        },
    ),
    "sd3.5-large": ("sd3", {"transformer": {"dual_attention_layers": []}}),
    "flux-dev": (
        "flux",
        {"transformer": {"guidance_embeds": True}, "scheduler": {**_FLOW, "shift": 3.0, "use_dynamic_shifting": True}},
    ),
    "flux-kontext": (
        "flux-dev",
        {"family": "flux-kontext", "generation": {"max_sequence_length": 16, "max_area": 32 * 32}},
    ),
    "flux2-klein": (
        "flux",
        {
            "family": "flux2-klein",
            "max_tokens": 24,
            "generation": {"max_sequence_length": 24, "text_encoder_out_layers": [1, 2, 3], "guidance_scale": 1.0},
            "pipeline": {"is_distilled": True},
            "centre_latents": False,
            "autoencoder": {"class": "AutoencoderKLFlux2", "shift_factor": ..., "scaling_factor": ...},
            "text_encoders": {
                "text_encoder": {
                    "class": "Qwen3ForCausalLM",
                    "tokenizer": "Qwen2Tokenizer",
                    **SMALL["Qwen3Model"],
                },
            },
            "transformer": {
                "class": "Flux2Transformer2DModel",
                "joint_attention_dim": 24,
                "axes_dims_rope": [4, 4, 4, 4],
                "pooled_projection_dim": ...,
            },
            "scheduler": {**_FLOW, "shift": 3.0, "use_dynamic_shifting": True},
        },
    ),
    "qwen-image": (
        "flux",
        {
            "family": "qwen-image",
            "max_tokens": 256,
            "generation": {"max_sequence_length": 256},
            "autoencoder": {
                "class": "AutoencoderKLQwenImage",
                **dict.fromkeys(_OF_KL, ...),
                "base_dim": 8,
                "z_dim": 4,
                "dim_mult": [1, 1, 1],
                "num_res_blocks": 1,
                "temperal_downsample": [False, False],
                "latents_mean": [0.1, -0.1, 0.2, 0.0],
                "latents_std": [0.5, 0.6, 0.7, 0.8],
            },
            "text_encoders": {
                "text_encoder": {
                    "class": "Qwen2_5_VLForConditionalGeneration",
                    "tokenizer": "Qwen2Tokenizer",
                    "text_config": {
                        **_QWEN,
                        "max_window_layers": 3,
                        "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]},
                    },
                    "vision_config": {
                        "depth": 1,
                        "hidden_size": 8,
                        "intermediate_size": 8,
                        "num_heads": 1,
                        "out_hidden_size": 8,
                        "fullatt_block_indexes": [0],
                    },
                }
            },
            "transformer": {
                "class": "QwenImageTransformer2DModel",
                "num_layers": 2,
                "patch_size": 2,
                "out_channels": 4,
                "joint_attention_dim": 8,
                "num_single_layers": ...,
                "pooled_projection_dim": ...,
            },
            "scheduler": {**_FLOW, "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192},
        },
    ),
}


def most_families(wanted: Callable[[Family], bool] = lambda _: True) -> list[Any]:
    """Parameters of a test that takes long: families without a teacher that ships run in the slow tests only."""
    return [
        name if family.tiny else pytest.param(name, marks=pytest.mark.slow)
        for name, family in FAMILIES.items()
        if wanted(family)
    ]


MOST_FAMILIES = most_families()
#: Families with a trained tiny teacher.
TRAINED = [name for name, family in FAMILIES.items() if family.tiny]
#: Of these, those whose denoiser can be exported.
EXPORTED = [name for name in TRAINED if not FAMILIES[name].without_graph]
#: Every family, as parameters of a test that takes very long: those beside Sana run in the slow tests only.
SANA_FIRST = [name if name == "sana" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
#: Every family, and every model of one that has other parts.
MODELS = [*FAMILIES, *(name for name in VARIANTS if name not in FAMILIES)]


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


def family_name(model: str) -> str:
    """Of one of `MODELS`."""
    return str(teacher_recipe(model)["family"])


def teacher_recipe(family: str) -> dict[str, Any]:
    """The shipped recipe of the family's tiny teacher, with models smaller still that draw 32 x 32 pixels.

    Args:
        family: or another of `MODELS`.
    """
    from fbqat_hub.training.teacher import RECIPES  # brings diffusers, without which tests/quantization starts faster

    if family in VARIANTS:
        like, changes = VARIANTS[family]
        recipe = teacher_recipe(like)
        merged = {**recipe, **changes}
        for part in ("autoencoder", "transformer"):
            settings = {**recipe[part], **changes.get(part, {})}
            merged[part] = {name: value for name, value in settings.items() if value is not ...}
        return merged
    recipes = [yaml.safe_load(path.read_text()) for path in sorted(RECIPES.glob("*.yaml"))]
    found = [recipe for recipe in recipes if recipe["family"] == family]
    assert found, f"family {family} has no teacher; add training/recipes/teachers/<name>.yaml with family: {family}"
    recipe = found[0] | {"size": 32}
    for part in (recipe["autoencoder"], recipe["transformer"], *recipe["text_encoders"].values()):
        part.update(SMALL.get(part["class"], {}))
    if recipe.get("centre_latents"):  # training would measure it
        recipe["autoencoder"]["shift_factor"] = 0.25
    return recipe


def call_of(family: str, pipeline: Any) -> dict[str, Any]:
    """Arguments of the pipeline call: 32 x 32 pixels in two steps, texts as the teacher's recipe has them.

    Args:
        family: or another of `MODELS`.
    """
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    native = FAMILIES[family_name(family)].native_size(component_configs(pipeline))
    return {**native, **teacher_recipe(family)["generation"], **size}


@pytest.fixture(scope="session")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``teacher_of(model)``: folder of the float pipeline of true classes of one of `MODELS`, untrained.

    Not to be written to.
    """

    from fbqat_hub.training.teacher import untrained_pipeline

    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("teacher") / f"tiny-{family}"
        save_pipeline(untrained_pipeline(teacher_recipe(family), CAPTIONS), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_sana(teacher_of: Callable[[str], Path]) -> Path:
    """Folder of a float SanaPipeline of true classes; 27 layers can be quantized. Not to be written to."""
    return teacher_of("sana")


@pytest.fixture(scope="session")
def half_sana(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Sana stored in float16. Not to be written to."""
    folder = tmp_path_factory.mktemp("half") / "tiny-sana"
    save_pipeline(load_pipeline(tiny_sana, torch.float16), folder)
    return folder


@pytest.fixture(scope="session")
def packed_folder(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed pipeline of the tiny Sana. Not to be written to."""
    from fbqat_hub.training.ptq import convert_pipeline

    return convert_pipeline(str(tiny_sana), tmp_path_factory.mktemp("packed") / "sana")


def weights_of(component: Path) -> Path:
    """The one weight file of a component's folder."""
    (path,) = component.glob("*.safetensors")
    return path


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(path)
    edit(tensors)
    path.unlink()  # what was loaded from it may be mapped
    save_file(tensors, path, metadata={"format": "pt"})


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
        "gptq": {"samples": 4},
        "optimizer": {"warmup_steps": 2},
        "save_every": 2,
        "evaluation": {"images": 4, "inference_steps": 2, "draws": 1, "batch_size": 4},
        "generation": {**CALL, "num_inference_steps": 9},  # as few as 8 would be trained at their own times only
    }


@pytest.fixture(scope="session")
def run_folder(recipe_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of that recipe. Not to be written to."""
    from fbqat_hub.training.distill import train
    from fbqat_hub.training.recipe import Recipe

    return train(Recipe(**recipe_fields), tmp_path_factory.mktemp("runs") / "tiny", progress=False)


# 8 bits are left after step 2, 6 after 4
STAGES: dict[str, Any] = {"method": "integer", "steps": 10, "keep_stages": [8, 6]}


@pytest.fixture(scope="session")
def staged_run(recipe_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept stages of 8 and 6 bits. Not to be written to."""
    from fbqat_hub.training.distill import train
    from fbqat_hub.training.recipe import Recipe

    recipe = Recipe(**recipe_fields | STAGES)
    return train(recipe, tmp_path_factory.mktemp("staged") / "run", progress=False)


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """A recipe file of exactly these fields."""
    path.write_text(yaml.safe_dump(recipe))
    return path
