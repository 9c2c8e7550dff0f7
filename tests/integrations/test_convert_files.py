"""Conversion tensor by tensor writes what conversion in memory writes, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fbqat_hub.components import Component, read_index
from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import FAMILIES
from fbqat_hub.integrations.convert_files import convert_files
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import edit_tensors, weights_of
from tests.test_components import as_variant, shard


def denoiser_of(folder: Path) -> Component:
    return read_index(folder)[1]["transformer"]


def in_memory(denoiser: Component, config: FBQATConfig, target: Path, shard: Any = "10GB") -> Path:
    denoiser.load(quantization_config=config).save_pretrained(target, max_shard_size=shard)
    return target


def assert_same_files(ours: Path, expected: Path) -> None:
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in expected.iterdir())
    for path in expected.iterdir():
        if path.name == "config.json":  # the folder that it was loaded from, which `replacing` leaves out
            left, right = (
                [line for line in file.read_text().splitlines() if "_name_or_path" not in line]
                for file in (ours / path.name, path)
            )
            assert left == right
        else:
            assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_that_save_pretrained_writes(family: str, teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    denoiser = denoiser_of(teacher_of(family))
    for number, fields in enumerate(({"average_bits": 4.5}, {"weight_granularity": "per_group", "group_size": 8})):
        config, ours = FBQATConfig(**fields), tmp_path / str(number)
        done: list[int] = []
        convert_files(denoiser, config, ours, done=done.append)
        assert_same_files(ours, in_memory(denoiser, config, tmp_path / f"expected-{number}"))
        assert sum(done) == sum(tensor.nbytes for tensor in load_file(weights_of(denoiser.folder)).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_from_shards_to_shards_in_any_dtype(dtype: torch.dtype, tiny_sana: Path, tmp_path: Path) -> None:
    denoiser = denoiser_of(shutil.copytree(tiny_sana, tmp_path / "source"))
    edit_tensors(
        weights_of(denoiser.folder),
        lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}),
    )
    shard(denoiser.folder)
    config = FBQATConfig(modules_to_not_convert=["proj_out"])
    convert_files(denoiser, config, tmp_path / "ours", shard=4000)
    assert_same_files(tmp_path / "ours", in_memory(denoiser, config, tmp_path / "expected", 4000))
    assert len(list((tmp_path / "ours").glob("*-of-*.safetensors"))) > 2
    assert (tmp_path / "ours" / "diffusion_pytorch_model.safetensors.index.json").is_file()


def test_a_variant(tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "source")
    as_variant(folder, "fp16")
    made = convert_pipeline(str(folder), tmp_path / "out", variant="fp16", progress=False)
    plain = convert_pipeline(str(tiny_sana), tmp_path / "plain", progress=False)
    assert_same_files(made / "transformer", plain / "transformer")
    load_pipeline(made)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors["proj_out.weight"].fill_(torch.nan), "proj_out.weight has values that are not finite"),
        (lambda tensors: tensors.pop("proj_out.weight"), "proj_out.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra"),
        (
            lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)}),
            r"proj_out.bias",
        ),
    ],
    ids=["nan", "missing", "extra", "shape"],
)
def test_what_does_not_fit_is_named(edit, message: str, tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "source")
    edit_tensors(weights_of(folder / "transformer"), edit)
    with pytest.raises(ValueError, match=message):
        convert_pipeline(str(folder), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
