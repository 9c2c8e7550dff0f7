"""Training in several processes on CPUs: the run of one process, shared out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from fbqat_hub.training.distill import train
from fbqat_hub.training.loop import own_parts
from tests.conftest import subprocess_environment, write_recipe

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# as `fbqat train`, but that the process of the rank given fails in step 5
STOPPED = """
import os, sys
from fbqat_hub.cli import main
from fbqat_hub.training import loop

step = loop.Loop.step

def stopping(self, number):
    if number == 4 and self.accelerator.process_index == int(sys.argv[1]):
        raise OSError(28, "No space left on device")
    return step(self, number)

loop.Loop.step = stopping
sys.exit(main(sys.argv[2:]))
"""
_SAME = ("step", "bit_width", "learning_rate")
WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


def two_processes(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *command], env=subprocess_environment(), capture_output=True, text=True, timeout=300
    )


def same_up_to_rounding(a: Path, b: Path, first: float = 5e-5) -> None:
    """Sums in another order: the last digits of the first losses differ, then a weight at the edge of two codes.

    Such a code moves a loss of this tiny model by 2e-4 of it. ``first`` is for the first two losses, of which that of a
    code of activations is a larger share where weights have 8 bits.
    """
    left, right = log_of(a), log_of(b)
    assert [line["step"] for line in left] == [line["step"] for line in right] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(left, right, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=first if ours["step"] < 3 else 1e-3)
        assert set(ours) == set(theirs)
        assert [ours[name] for name in _SAME] == [theirs[name] for name in _SAME]
    ours, theirs = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if name.endswith("weight_packed"):
            assert share_that_differs(value, theirs[name]) < 0.01, name
        else:
            assert value.allclose(theirs[name], rtol=1e-3, atol=1e-4), name


def share_that_differs(a: Tensor, b: Tensor) -> float:
    return float((a != b).float().mean())


def test_a_batch_is_shared_out_equally(recipe_of) -> None:
    recipe = recipe_of(batch_size=12, micro_batch_size=3)
    shares = [own_parts(recipe, process, 2) for process in (0, 1)]
    assert shares == [[slice(0, 3), slice(3, 6)], [slice(6, 9), slice(9, 12)]]
    assert own_parts(recipe_of(batch_size=12), 2, 3) == [slice(8, 12)]
    for size, advice in ((1, "make it 2, or"), (5, "make it 4 or 6, or")):
        with pytest.raises(ValueError, match=f"batch_size is {size}, of all 2 processes together.*{advice}"):
            own_parts(recipe_of(batch_size=size), 0, 2)


@pytest.mark.parametrize("changes", [{}, {"method": "vqat", "loss_weighting": "sampler"}], ids=["default", "weighted"])
def test_parts_of_a_batch_add_up_to_the_whole(changes: dict[str, Any], recipe_of, tmp_path: Path) -> None:
    """Of unequal size too: 4 samples as 3 and 1."""
    runs = [
        train(recipe_of(**changes, micro_batch_size=size), tmp_path / f"{size}", progress=False) for size in (None, 3)
    ]
    same_up_to_rounding(*runs)


@pytest.mark.slow
def test_two_processes_train_as_one(recipe_of, recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = recipe_fields | {"validate_every": 3}
    one = train(recipe_of(validate_every=3), tmp_path / "one", progress=False)
    recipe, two = write_recipe(tmp_path / "recipe.yaml", fields), tmp_path / "two"
    done = two_processes("-m", "fbqat_hub.cli", "train", str(recipe), "--output", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"saved {two}") == 1
    assert done.stderr.count("train fbqat: 6 of 6 steps") == 1
    losses = [[line["validation_loss"] for line in log_of(run) if "validation_loss" in line] for run in (one, two)]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert yaml.safe_load((two / "recipe.yaml").read_text()) == yaml.safe_load((one / "recipe.yaml").read_text())
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    same_up_to_rounding(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all_and_another_number_of_them_goes_on(
    rank: int, recipe_of, recipe_fields: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoint after step 4 is of two processes; one resumes it. Then the other way round."""
    recipe, whole = write_recipe(tmp_path / "recipe.yaml", recipe_fields), recipe_of()
    (tmp_path / "stopped.py").write_text(STOPPED)
    began, run = time.monotonic(), tmp_path / "run"
    given = ["train", str(recipe), "--output", str(run)]
    done = two_processes(str(tmp_path / "stopped.py"), str(rank), *given)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert time.monotonic() - began < 120
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]
    train(whole, run, resume=True, progress=False)
    one = train(whole, tmp_path / "one", progress=False)
    same_up_to_rounding(run, one)


@pytest.mark.slow
def test_saved_by_one_and_resumed_by_two(recipe_of, recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path / "recipe.yaml", recipe_fields), tmp_path / "run"
    (tmp_path / "stopped.py").write_text(STOPPED)
    given = ["train", str(recipe), "--output", str(run)]
    alone = subprocess.run(
        [sys.executable, str(tmp_path / "stopped.py"), "0", *given], env=subprocess_environment(), capture_output=True
    )
    assert alone.returncode == 1
    done = two_processes("-m", "fbqat_hub.cli", *given, "--resume")
    assert done.returncode == 0, done.stderr
    same_up_to_rounding(run, train(recipe_of(), tmp_path / "one", progress=False))


@pytest.mark.slow
def test_fewer_samples_than_processes(recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path / "recipe.yaml", recipe_fields | {"batch_size": 1}), tmp_path / "run"
    done = two_processes("-m", "fbqat_hub.cli", "train", str(recipe), "--output", str(run))
    assert done.returncode != 0
    assert "batch_size is 1, of all 2 processes together" in done.stderr
    assert not run.exists()
