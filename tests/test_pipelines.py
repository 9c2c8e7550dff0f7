"""Whole pipelines are found, loaded in the dtype that is stored or asked for, and saved in one go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaTransformer2DModel
from torch import nn

from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline, save_pipeline, save_quantized
from tests.conftest import CALL, weights_of


def dtypes_of(pipeline: Any) -> dict[str, torch.dtype]:
    return {name: part.dtype for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def test_not_a_pipeline(packed_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a diffusers pipeline: it has no model_index.json"):
        load_pipeline(packed_folder / "transformer")
    mistyped = ("./missing", "missing", "C:\\models\\sana", "~/sana", "runs/sana/w4", "me/my sana")
    for source in (tmp_path / "missing", packed_folder / "model_index.json", *mistyped):
        with pytest.raises(FileNotFoundError, match="is no folder, nor a Hub id"):
            load_pipeline(source)


@pytest.mark.parametrize("name", ["flux1-schnell-fp8.safetensors", "sd3.5.gguf", "old.ckpt"])
def test_a_single_file_is_answered_with_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match=rf"{name} is a single file of weights; .* from_single_file .*, then save"):
        load_pipeline(tmp_path / name)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_truncated_file_is_named(packed_folder: Path, component: str, keep: float, tmp_path: Path) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "cut")
    path = weights_of(folder / component)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match=f"{component}/{path.name} is damaged or cut short"):
        load_pipeline(folder)


# dtypes


def test_each_part_is_loaded_as_it_is_stored(half_sana: Path, tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(half_sana, tmp_path / "mixed")
    shutil.copytree(tiny_sana / "vae", folder / "vae", dirs_exist_ok=True)
    half = torch.float16
    assert dtypes_of(load_pipeline(folder)) == {"transformer": half, "text_encoder": half, "vae": torch.float32}
    assert set(dtypes_of(load_pipeline(folder, torch.float32)).values()) == {torch.float32}


def test_meta_has_the_structure_and_no_numbers(half_sana: Path) -> None:
    pipeline = load_pipeline(half_sana, meta=True)
    for name in dtypes_of(pipeline):
        assert {parameter.device.type for parameter in getattr(pipeline, name).parameters()} == {"meta"}
    assert get_family("sana").native_size(pipeline) == get_family("sana").native_size(load_pipeline(half_sana))


# saving


def test_parts_of_the_source_are_copied_byte_for_byte(half_sana: Path, packed_folder: Path, tmp_path: Path) -> None:
    """Whatever the dtype that they were loaded in."""
    packed = load_pipeline(packed_folder, torch.float32).transformer
    save_quantized(packed, half_sana, tmp_path / "out")
    copied = [path.relative_to(half_sana) for path in half_sana.rglob("*") if path.is_file()]
    for path in (path for path in copied if path.parts[0] != "transformer"):
        assert (tmp_path / "out" / path).read_bytes() == (half_sana / path).read_bytes(), path
    dtypes = dtypes_of(load_pipeline(tmp_path / "out"))
    assert dtypes == {"text_encoder": torch.float16, "vae": torch.float16, "transformer": torch.float32}
    assert load_pipeline(tmp_path / "out").transformer.is_quantized


def test_no_path_of_this_machine_is_saved(packed_folder: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(packed_folder)  # which notes where from
    assert str(packed_folder) in json.dumps(dict(pipeline.transformer.config), default=str)
    save_pipeline(pipeline, tmp_path / "memory")
    save_quantized(pipeline.transformer, packed_folder, tmp_path / "copied")
    written = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(written) > 8
    assert [text for text in written if "name_or_path" in text or str(packed_folder.parent) in text] == []


def test_failed_save_leaves_nothing_that_looks_whole(packed_folder: Path, tmp_path: Path, monkeypatch) -> None:
    pipeline = load_pipeline(packed_folder)
    (tmp_path / "notes.txt").write_text("mine")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SanaTransformer2DModel, "save_pretrained", full)
    for target in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            save_pipeline(pipeline, target)
        with pytest.raises(OSError, match="No space left"):
            save_quantized(pipeline.transformer, packed_folder, target)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_save_over_an_older_one(half_sana: Path, packed_folder: Path, tmp_path: Path) -> None:
    for source in (half_sana, packed_folder):
        save_pipeline(load_pipeline(source), tmp_path)
    assert load_pipeline(tmp_path).transformer.is_quantized
    assert load_pipeline(tmp_path).vae.dtype == torch.float32


def test_training_family_loads_what_it_saved(packed_folder: Path) -> None:
    """The packed pipeline encodes prompts as its teacher does, so that results can be compared."""
    pipeline = load_pipeline(packed_folder)
    assert get_family("sana").encode_prompts(pipeline, ["red"], CALL)["encoder_hidden_states"].isfinite().all()
