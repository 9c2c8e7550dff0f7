"""A pipeline's parts: whole or refused by name, whatever layout they have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from fbqat_hub.components import Component, check_pipeline, read_index
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.distill import load_teacher
from fbqat_hub.training.generate import generate
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe
from tests.conftest import edit_tensors, weights_of

STEM = "diffusion_pytorch_model"


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    kept = {key: value for key, value in {**index, **changes}.items() if value is not ...}
    (folder / "model_index.json").write_text(json.dumps(kept))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def shard(component: Path, variant: str | None = None) -> Path:
    """Save a model's weights as shards; returns the index."""
    path = weights_of(component)
    tensors = load_file(path)
    path.unlink()
    stem, middle = path.name.removesuffix(".safetensors"), f".{variant}" if variant else ""
    places = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"{stem}{middle}-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, component / name, metadata={"format": "pt"})
        places |= dict.fromkeys(names, name)
    index = component / f"{stem}.safetensors.index{middle}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def as_variant(folder: Path, variant: str = "fp16") -> None:
    """Rename every weight file of a pipeline to one of a variant."""
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(f".{variant}.safetensors"))


# a part that is not whole: (edit of a float pipeline's folder, message)
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer is missing, and model_index\.json names it"),
    "no vocabulary": (
        lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
        r"tokenizer lacks tokenizer_config\.json and tokenizer\.json, which a GemmaTokenizer is made from",
    ),
    "empty vocabulary": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text(""), "tokenizer lacks"),
    "damaged vocabulary": (
        lambda f: edit_json(f / "tokenizer" / "tokenizer.json", lambda t: t.pop("model")),
        "tokenizer cannot be loaded",
    ),
    "no tokenizer settings": (lambda f: (f / "tokenizer" / "tokenizer_config.json").unlink(), "tokenizer lacks"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler is missing"),
    "no scheduler settings": (
        lambda f: (f / "scheduler" / "scheduler_config.json").unlink(),
        r"scheduler lacks scheduler_config\.json",
    ),
    "no decoder": (lambda f: shutil.rmtree(f / "vae"), "vae is missing"),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), r"vae has no config\.json"),
    "no weights": (lambda f: weights_of(f / "text_encoder").unlink(), "text_encoder has no safetensors"),
    "weights are a folder": (
        lambda f: (weights_of(f / "vae").unlink(), (f / "vae" / f"{STEM}.safetensors").mkdir()),
        "vae has no safetensors",
    ),
    "no denoiser weights": (lambda f: weights_of(f / "transformer").unlink(), "transformer has no safetensors"),
    "other weights": (
        lambda f: weights_of(f / "vae").rename(f / "vae" / "dc-ae.safetensors"),
        rf"vae has no {STEM}\.safetensors, but dc-ae\.safetensors",
    ),
    "index without a part": (lambda f: edit_index(f, tokenizer=...), "names no tokenizer, which a SanaPipeline needs"),
    "index with null": (lambda f: edit_index(f, transformer=[None, None]), "names no transformer"),
    "class of a newer version": (
        lambda f: edit_index(f, vae=["diffusers", "AutoencoderXL9"]),
        r"vae is a AutoencoderXL9, which diffusers [\d.]+ does not have",
    ),
    "class that is no part": (
        lambda f: edit_index(f, tokenizer=["diffusers", "DiffusionPipeline"]),
        "is a DiffusionPipeline, which is neither a model",
    ),
    "missing tensor": (
        lambda f: edit_tensors(weights_of(f / "vae"), lambda t: t.pop(min(t))),
        "vae lacks tensors of a AutoencoderDC",
    ),
    "missing tensor of the text encoder": (
        lambda f: edit_tensors(weights_of(f / "text_encoder"), lambda t: t.pop(min(t))),
        "text_encoder lacks tensors of a Gemma2Model",
    ),
    "missing tensor of the denoiser": (
        lambda f: edit_tensors(weights_of(f / "transformer"), lambda t: t.pop("scale_shift_table")),
        "transformer lacks tensors of a SanaTransformer2DModel: scale_shift_table",
    ),
    "extra tensor": (
        lambda f: edit_tensors(weights_of(f / "transformer"), lambda t: t.update(lora=torch.zeros(2))),
        "transformer has tensors that are none of a SanaTransformer2DModel: lora",
    ),
    "wrong shape": (
        lambda f: edit_tensors(weights_of(f / "vae"), lambda t: t.update({min(t): torch.zeros(3)})),
        r"vae cannot be loaded .*expected shape .*\[3\]",
    ),
    "wrong shape in the text encoder": (
        lambda f: edit_tensors(weights_of(f / "text_encoder"), lambda t: t.update({"norm.weight": torch.zeros(3)})),
        r"text_encoder has tensors of other shapes than those of a Gemma2Model: norm\.weight",
    ),
    "whole numbers": (
        lambda f: edit_tensors(weights_of(f / "vae"), lambda t: t.update({min(t): t[min(t)].to(torch.int8)})),
        "vae has whole numbers where there should be fractions",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_part_that_is_not_whole_stops_every_command(
    name: str, tiny_sana: Path, recipe_fields: dict[str, Any], tmp_path: Path
) -> None:
    edit, message = BROKEN[name]
    folder = shutil.copytree(tiny_sana, tmp_path / "source")
    edit(folder)
    commands: list[Callable[[], object]] = [
        lambda: load_pipeline(folder),
        lambda: load_pipeline(folder, meta=True),
        lambda: load_teacher(Recipe(**{**recipe_fields, "teacher": str(folder)})),
        lambda: convert_pipeline(str(folder), tmp_path / "out"),
        lambda: generate(str(folder), ["red"], tmp_path / "red.png"),
    ]
    for command in commands:
        with pytest.raises(ValueError, match=message):
            command()
    assert not (tmp_path / "out").exists()


BAD = [
    ("transformer", "scale_shift_table"), ("transformer", "proj_out.bias"), ("transformer", "proj_out.weight"),
    ("text_encoder", "norm.weight"), ("vae", "decoder.conv_in.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("component", "tensor"), BAD)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_number_that_is_not_finite_is_named_by_file_and_tensor(
    component: str, tensor: str, bad: float, tiny_sana: Path, recipe_fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "source")
    path = weights_of(folder / component)
    edit_tensors(path, lambda tensors: tensors[tensor].view(-1)[-1:].fill_(bad))
    message = rf"{component}/{path.name}: {tensor} has values that are not finite"
    for command in (
        lambda: load_pipeline(folder),
        lambda: load_teacher(Recipe(**{**recipe_fields, "teacher": str(folder)})),
        lambda: convert_pipeline(str(folder), tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=message):
            command()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("class_name", "files", "whole"),
    [
        ("CLIPTokenizer", ["vocab.json", "merges.txt"], True),
        ("CLIPTokenizer", ["vocab.json"], False),
        ("T5TokenizerFast", ["spiece.model"], True),
        ("T5Tokenizer", ["vocab.json", "merges.txt"], False),
        ("GemmaTokenizer", ["tokenizer.json"], True),
        ("CLIPImageProcessor", ["preprocessor_config.json"], True),
        ("CLIPImageProcessor", [], False),
    ],
)
def test_vocabularies_that_tokenizers_have(class_name: str, files: list[str], whole: bool, tmp_path: Path) -> None:
    for name in (*files, "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    component = Component(tmp_path, "transformers", class_name)
    if whole:
        component.check()
    else:
        with pytest.raises(ValueError, match=f"lacks .*, which a {class_name} is made from"):
            component.check()


def test_text_encoders_but_the_first_can_be_left_out(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(teacher_of("sd3"), tmp_path / "sd3")
    edit_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert "text_encoder_3" not in check_pipeline(folder)
    edit_index(folder, text_encoder=[None, None])
    with pytest.raises(ValueError, match="names no text_encoder, which a StableDiffusion3Pipeline needs"):
        check_pipeline(folder)


# layouts


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_where_there_is_an_index_and_a_single_file_the_library_decides(
    library: str, tiny_sana: Path, tmp_path: Path
) -> None:
    """What is checked and copied is what is loaded."""
    component = read_index(shutil.copytree(tiny_sana, tmp_path / "both"))[1][
        "vae" if library == "diffusers" else "text_encoder"
    ]
    single = weights_of(component.folder)
    content = single.read_bytes()
    shard(component.folder)
    single.write_bytes(content)
    edit_tensors(single, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    zeros = all(not parameter.any() for parameter in component.load().parameters())
    assert zeros == (library == "transformers") == (component.weights().files == (single,))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i.unlink(), "vae has no .*safetensors, but diffusion_pytorch_model-00001-of-00002.safetensors"),
        (lambda i: i.write_text("[]"), "has no weight_map"),
        (lambda i: edit_json(i, lambda c: c.pop("weight_map")), "has no weight_map"),
        (
            lambda i: i.with_name(f"{STEM}-00002-of-00002.safetensors").unlink(),
            rf"index\.json names {STEM}-00002-of-00002\.safetensors, which is missing",
        ),
        (
            lambda i: edit_json(i, lambda c: c["weight_map"].update({min(c["weight_map"]): "../evil.safetensors"})),
            r"names '\.\./evil\.safetensors', which is no safetensors file beside it",
        ),
        (
            lambda i: edit_json(i, lambda c: c["weight_map"].update(ghost=f"{STEM}-00001-of-00002.safetensors")),
            "and the files that it names differ about ghost",
        ),
        (
            lambda i: edit_json(i, lambda c: c["weight_map"].pop("decoder.conv_in.bias")),
            r"and the files that it names differ about decoder\.conv_in\.bias",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(edit, message: str, tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "sharded")
    edit(shard(folder / "vae"))
    for command in (lambda: load_pipeline(folder), lambda: convert_pipeline(str(folder), tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            command()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("asked", [None, "fp16"])
def test_the_only_variant_is_taken_and_copied_under_plain_names(
    sharded: bool, asked: str | None, half_sana: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(half_sana, tmp_path / "variant")
    stored = {name: load_file(weights_of(folder / name)) for name in ("vae", "text_encoder")}
    if sharded:
        for name in ("vae", "text_encoder", "transformer"):
            shard(folder / name, "fp16")
    else:
        as_variant(folder)
    output = convert_pipeline(str(folder), tmp_path / "out", variant=asked)
    assert [path for path in output.rglob("*") if "fp16" in path.name] == []
    for name, tensors in stored.items():
        copied = {}
        for path in (output / name).glob("*.safetensors"):
            copied |= load_file(path)
        assert set(copied) == set(tensors)
        assert all(copied[key].dtype == torch.float16 and copied[key].equal(tensors[key]) for key in tensors)
    assert load_pipeline(output).vae.dtype == torch.float16  # and so by plain names
    assert AutoencoderDC.from_pretrained(output / "vae", use_safetensors=True).config.latent_channels == 4


def test_of_both_variants_one_is_used_and_copied(half_sana: Path, tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(half_sana, tmp_path / "both")
    as_variant(folder)
    shutil.copytree(tiny_sana, folder, dirs_exist_ok=True)
    for variant, source, dtype in ((None, tiny_sana, torch.float32), ("fp16", half_sana, torch.float16)):
        output = convert_pipeline(str(folder), tmp_path / f"out-{variant}", variant=variant)
        for name in ("vae", "text_encoder"):
            assert weights_of(output / name).read_bytes() == weights_of(source / name).read_bytes()
        assert load_pipeline(folder, variant=variant).transformer.dtype == dtype


def test_a_variant_that_is_not_there_is_named_with_those_that_are(tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "variants")
    with pytest.raises(ValueError, match="has no weights of variant bf16; it has no variants"):
        load_pipeline(folder, variant="bf16")
    as_variant(folder, "fp16")
    with pytest.raises(ValueError, match="has the variants fp16, and not bf16; choose one of them"):
        load_pipeline(folder, variant="bf16")
    path = weights_of(folder / "vae")
    shutil.copy(path, path.with_name(f"{STEM}.bf16.safetensors"))
    with pytest.raises(ValueError, match="vae has the variants bf16, fp16, and no files without a variant; choose one"):
        load_pipeline(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_its_values(dtype: torch.dtype, tiny_sana: Path, tmp_path: Path) -> None:
    """Conversion of it gives what conversion of the same values in float32 gives."""
    folders = {name: shutil.copytree(tiny_sana, tmp_path / name) for name in ("float8", "float32")}
    for name, folder in folders.items():
        for path in folder.glob("*/*.safetensors"):
            for_all = (lambda v: v.to(dtype)) if name == "float8" else (lambda v: v.to(dtype).float())
            edit_tensors(path, lambda t, change=for_all: t.update({key: change(value) for key, value in t.items()}))
    float8, float32 = (load_pipeline(convert_pipeline(str(f), tmp_path / f"w4-{n}")) for n, f in folders.items())
    assert float8.transformer.dtype == float8.vae.dtype == torch.bfloat16
    for component in ("transformer", "vae", "text_encoder"):
        right = getattr(float32, component).state_dict()
        for name, value in getattr(float8, component).state_dict().items():
            assert torch.equal(value.to(right[name].dtype), right[name]), name


def test_copies_hold_no_path_and_nothing_else(tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "source")
    edit_json(folder / "vae" / "config.json", lambda config: config.update(_name_or_path="/home/me/vae"))
    (folder / "vae" / "notes.md").write_text("mine")
    (folder / "vae" / "onnx").mkdir()
    output = convert_pipeline(str(folder), tmp_path / "out")
    assert "name_or_path" not in (output / "vae" / "config.json").read_text()
    assert sorted(path.name for path in (output / "vae").iterdir()) == ["config.json", f"{STEM}.safetensors"]
    assert (output / "tokenizer" / "tokenizer.json").read_bytes() == (
        tiny_sana / "tokenizer" / "tokenizer.json"
    ).read_bytes()
