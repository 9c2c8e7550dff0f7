"""What is written can be read by others, as the umask says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fbqat_hub.export.folder import staging
from fbqat_hub.files import whole
from fbqat_hub.pipelines import replacing


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("writing", [whole, staging, replacing])
def test_weights_have_the_mode_of_any_new_file(
    writing: Callable[[Path], AbstractContextManager[Path]], umask: int, tmp_path: Path
) -> None:
    with writing(tmp_path / "made") as folder:
        (folder / "vae").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        save_file({"weight": torch.ones(2)}, folder / "vae" / "model.safetensors")
    made = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o666 & ~umask}
    assert len(made) == 2


def test_so_has_a_single_file(umask: int, tmp_path: Path) -> None:
    with whole(tmp_path / "model.safetensors") as partial:
        save_file({"weight": torch.ones(2)}, partial)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
