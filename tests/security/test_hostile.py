"""Hostile folders and files are refused by name, before memory is spent on them and before any code of theirs runs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaTransformer2DModel
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from fbqat_hub.evaluation.results import read_records
from fbqat_hub.pictures import read_picture
from fbqat_hub.pipelines import load_pipeline, save_quantized
from fbqat_hub.training.prompts import _with_pictures
from fbqat_hub.training.recipe import load_recipe

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
LAYER = "transformer_blocks.0.attn1.to_q.weight_packed"
DEEP = "[" * 100_000


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def header(edit: Callable[[dict[str, Any]], object], path: Path = WEIGHTS) -> Callable[[Path], object]:
    return lambda folder: edit_header(folder / path, edit)


def config(component: str = "transformer", **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / component / "config.json", **changes)


def index(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "model_index.json", **changes)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def of_scheduler(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "scheduler" / "scheduler_config.json", **changes)


def rename(component: str) -> Callable[[Path], object]:
    """A tensor under another name: its own would be filled with random numbers."""

    def edit(folder: Path) -> None:
        (path,) = (folder / component).glob("*.safetensors")
        edit_header(path, lambda h: h.update(other=h.pop(next(key for key in h if key != "__metadata__"))))

    return edit


def as_pickle(component: str, name: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (path,) = (folder / component).glob("*.safetensors")
        torch.save(load_file(path), path.with_name(name))
        path.unlink()

    return edit


def link_out(folder: Path) -> None:
    (folder / "vae" / "config.json").rename(folder.parent / "outside.json")
    (folder / "vae" / "config.json").symlink_to(folder.parent / "outside.json")


def pipe(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    (folder / "transformer" / "evil.py").write_text("raise SystemExit('this ran')")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "header of 2^62 bytes": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + bytes(99)),
        f"{WEIGHTS} is damaged or cut short .*header too large",
    ),
    "deep header": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(DEEP)) + DEEP.encode()),
        f"{WEIGHTS} is damaged or cut short",
    ),
    "giant shape": (header(lambda h: h[LAYER].update(shape=[2**40, 2**40])), f"{WEIGHTS} is damaged .*overflow"),
    "shape beyond the file": (header(lambda h: h[LAYER].update(shape=[2**20, 2**20])), f"{WEIGHTS} is damaged"),
    "overlapping tensors": (
        header(lambda h: h[LAYER].update(data_offsets=h[f"{LAYER[:-14]}.weight_scale"]["data_offsets"])),
        f"{WEIGHTS} is damaged",
    ),
    "offsets out of the file": (
        header(lambda h: h[LAYER].update(data_offsets=[2**50, 2**50 + 128])),
        f"{WEIGHTS} is damaged",
    ),
    "wrong dtype": (
        header(lambda h: h[LAYER].update(dtype="I8")),
        f"{LAYER} is torch.int8; docs/format.md has torch.uint8 there",
    ),
    "unknown dtype": (header(lambda h: h[LAYER].update(dtype="PICKLE")), f"{WEIGHTS} is damaged"),
    "vae lacks a tensor": (rename("vae"), "vae lacks tensors of a AutoencoderDC"),
    "text encoder lacks a tensor": (rename("text_encoder"), "text_encoder lacks tensors of a Gemma2Model"),
    "vae has more than its class takes": (
        config("vae", decoder_layers_per_block=[0, 1, 1, 0]),
        "tensors that are none of",
    ),
    "deep model_index": (text("model_index.json", DEEP), "model_index.json is nested too deep"),
    "deep config": (text("transformer/config.json", DEEP), "transformer/config.json is nested too deep"),
    "deep scheduler": (text("scheduler/scheduler_config.json", DEEP), "scheduler_config.json is nested too deep"),
    "scheduler is a list": (text("scheduler/scheduler_config.json", "[]"), "scheduler_config.json holds no object"),
    "a thousand million timesteps": (of_scheduler(num_train_timesteps=10**9), "num_train_timesteps is 1000000000; at"),
    "fewer than no timesteps": (of_scheduler(num_train_timesteps=-5), "scheduler cannot be loaded .ValueError"),
    "endless shift": (of_scheduler(shift=math.inf), "scheduler_config.json: shift is inf; at most"),
    "shift of NaN": (of_scheduler(shift=math.nan), "scheduler_config.json: shift is NaN, no number"),
    "decoder's factor is NaN": (config("vae", scaling_factor=math.nan), "vae/config.json: scaling_factor is NaN"),
    "decoder's factor is text": (config("vae", scaling_factor="x"), "scaling_factor is 'x'; it must be a number, such"),
    "BOM": (text("vae/config.json", "\ufeff{}"), "vae cannot be loaded"),
    "deep tokenizer": (text("tokenizer/tokenizer.json", DEEP), "cannot be loaded .RecursionError"),
    "large config": (text("vae/config.json", " " * 2**22 + "{}"), "vae/config.json has 4194306 bytes; .* at most"),
    "config is a list": (text("vae/config.json", "[]"), "vae/config.json holds no object"),
    "a thousand million layers": (config(num_layers=10**9), r"num_layers is 1000000000; at most \d+ is .* tensors"),
    "layers beyond any float": (config(num_layers=10**400), "num_layers is 10{400}; at most"),
    "a million blocks": (config("vae", encoder_block_out_channels=[8] * 9999), "the length of .* is 9999; at most"),
    "wide latents": (config(sample_size=3000), "config.json: sample_size is 3000; at most 512"),
    "wide encoder": (config("text_encoder", hidden_size=10**7), "hidden_size is 10000000; at most 1048576"),
    "text for a number": (config(num_layers="2"), "num_layers is '2'; it must be a number"),
    "quantization_config is a list": (config(quantization_config=[1]), "transformer cannot be loaded"),
    "pickled denoiser": (as_pickle("transformer", "diffusion_pytorch_model.bin"), "no safetensors, but diffusion_py"),
    "pickled encoder": (as_pickle("text_encoder", "pytorch_model.bin"), "no safetensors, but pytorch_model.bin"),
    "link out of the folder": (link_out, "vae/config.json is a link out of the folder"),
    "named pipe": (pipe, "vae/config.json is neither a file nor a folder"),
    "own pipeline class": (
        lambda folder: (own_code(folder), edit_json(folder / "model_index.json", _class_name=["evil", "Evil"])),
        "names no pipeline class",
    ),
    "own model class": (
        lambda folder: (own_code(folder), edit_json(folder / "model_index.json", transformer=["evil", "Evil"])),
        "transformer is .*; it must be a class of diffusers or transformers, since no other code is run",
    ),
    "class of another library": (index(vae=["subprocess", "Popen"]), "vae is .*'Popen'.*; it must be a class of"),
    "component outside": (index(**{"../vae": ["diffusers", "AutoencoderDC"]}), "'../vae' is no name of a component"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_by_name(name: str, packed_folder: Path, tmp_path: Path) -> None:
    edit, message = HOSTILE[name]
    folder = shutil.copytree(packed_folder, tmp_path / "hostile")
    edit(folder)
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


def test_a_repository_is_downloaded_then_checked_then_loaded(packed_folder: Path, tmp_path: Path, monkeypatch) -> None:
    folder, asked = shutil.copytree(packed_folder, tmp_path / "snapshot"), []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert type(load_pipeline("me/sana")).__name__ == "SanaPipeline"
    assert asked == [("me/sana", {"revision": None, "use_safetensors": True, "variant": None})]
    link_out(folder)
    with pytest.raises(ValueError, match=r"vae/config\.json is a link out of the folder"):
        load_pipeline("me/sana")


def test_the_hubs_cache_may_link_to_its_blobs(packed_folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--sana" / "snapshots" / "abc", tmp_path / "models--me--sana" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in packed_folder.rglob("*") if path.is_file())):
        target = snapshot / path.relative_to(packed_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    stored = load_file(packed_folder / WEIGHTS)
    assert torch.equal(load_pipeline(snapshot).transformer.state_dict()[LAYER], stored[LAYER])


def test_plain_from_pretrained_takes_packed_weights_from_safetensors_only(packed_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "hostile")
    as_pickle("transformer", "diffusion_pytorch_model.bin")(folder)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is no safetensors file"):
        SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer")


def test_code_and_pickles_beside_the_weights_are_not_passed_on(packed_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(packed_folder, tmp_path / "source")
    (source / "vae" / "evil.py").write_text("raise SystemExit('this ran')")
    (source / "vae" / "evil.pt").write_bytes(b"\x80\x04")
    save_quantized(load_pipeline(source).transformer, source, tmp_path / "saved")
    assert (tmp_path / "saved" / "vae" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "saved").rglob("evil*")] == []


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says this size; its data is one byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8193, 100_000])
def test_a_picture_that_unpacks_to_gigabytes_is_refused(side: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(side, side))
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as a picture \(.*pixels"):
        read_picture(tmp_path / "bomb.png")


def test_a_picture_is_what_its_name_says(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "run.eps")
    (tmp_path / "run.eps").rename(tmp_path / "run.png")
    with pytest.raises(ValueError, match=r"run\.png cannot be read as a picture"):
        read_picture(tmp_path / "run.png")


def test_a_zip_of_pictures_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as file:
        for _ in range(257):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"p\.zip: a\.png unpacks to 269484032 bytes"):
        next(_with_pictures(str(tmp_path / "p.zip"), [[("red", "a")]]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "is not YAML: an alias"),
        ("!!python/object/apply:os.system ['echo this ran']\n", "is not YAML: could not determine a constructor"),
        (DEEP, "nested too deep"),
        ("steps: 1\nname: x\nsteps: 2\n", "is not YAML: steps stands twice, again on line 3; give it once"),
        ("generation: {height: 64, height: 32}\n", "height stands twice, again on line 1"),
        ("#" * 2**20 + "\nname: x\n", "has 1048585 bytes"),
        ("name: 2001-99-99\n", "is not YAML: month must be"),
        ("steps: 010\n", "is not YAML: 010 is 8 to YAML, which reads it in base 8; write the number without"),
        ("seed: 12:30\n", "is not YAML: 12:30 is 750 to YAML, which reads it in base 60"),
        ("{name: x, family: sana, teacher: t, generation: {height: 1000000}}", "generation.height is 1000000"),
        ("{name: x, family: sana, teacher: t, generation: {num_inference_steps: 1000000}}", "num_inference_steps is"),
    ],
)
def test_a_hostile_recipe_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_deep_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"results\.json is nested too deep"):
        read_records(tmp_path / "results.json")


def test_the_tests_that_security_md_names_are_there() -> None:
    written = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (Path(__file__).parents[2] / "SECURITY.md").read_text()))
    assert len(named) > 10
    assert {name for name in named if f"def {name}(" not in written} == set()
