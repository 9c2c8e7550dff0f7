"""Training checkpoints: safetensors only, written beside and renamed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fbqat_hub.training.adam import joined_tensors, plain_tensors
from fbqat_hub.training.migration import without_removed
from fbqat_hub.training.sharding import gathered, shared_like
from fbqat_hub.untrusted import read_yaml

_KEEP = 2
_STATE = "state.safetensors"
# of a scaler's state, what is a whole number
_COUNTS = ("growth_interval", "_growth_tracker")
_ABSENT = "(none)"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: str,
    scaler: torch.amp.GradScaler | None = None,
    *,
    writes: bool = True,
) -> None:
    """Write ``folder/step-<step>`` with the model's, the optimizer's and the scaler's tensors, and keep the newest two.

    Tensors of which each process holds a part are stored whole; all processes must call this, and one writes.

    Args:
        step: optimizer steps done.
        recipe: the recipe as YAML, kept to refuse a resume with another one.
        scaler: of the loss in float16, if there is one.
        writes: False in the processes that only give their parts.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        whole = gathered(value.detach())
        if writes:
            tensors[f"model.{name}"] = whole.clone()  # tied weights share memory, which safetensors does not store
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            whole = gathered(value)
            if writes:
                tensors |= plain_tensors(f"optimizer.{index}.{name}", whole)
    if not writes:
        return
    for name, number in (scaler.state_dict() if scaler else {}).items():
        tensors[f"scaler.{name}"] = torch.tensor(number, dtype=torch.float64)  # holds its floats and counts exactly
    partial, final = folder / f"step-{step:08d}.partial", folder / f"step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial / _STATE)
        (partial / "recipe.yaml").write_text(recipe)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:  # no space, Ctrl-C: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in _complete(folder)[:-_KEEP]:
        shutil.rmtree(old)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: str,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Restore the newest checkpoint that is whole; returns the steps done, 0 if there is none.

    Raises:
        ValueError: as ``newest_checkpoint``.
    """
    newest = newest_checkpoint(folder, recipe)
    if newest is None:
        return 0
    model_state: dict[str, torch.Tensor] = {}
    optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
    scaler_state: dict[str, float | int] = {}
    for key, value in load_file(newest / _STATE).items():
        kind, _, rest = key.partition(".")
        if kind == "model":
            model_state[rest] = value
        elif kind == "scaler":
            number = value.item()
            scaler_state[rest] = int(number) if rest in _COUNTS else number
        else:
            index, _, name = rest.partition(".")
            optimizer_state.setdefault(int(index), {})[name] = value
    own = model.state_dict()
    model.load_state_dict({name: shared_like(value, own.get(name)) for name, value in model_state.items()})
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: shared_like(value, parameters[index]) for name, value in joined_tensors(stored).items()}
        for index, stored in optimizer_state.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if scaler:
        scaler.load_state_dict(scaler_state)
    return int(newest.name.removeprefix("step-"))


def newest_checkpoint(folder: Path, recipe: str) -> Path | None:
    """The newest checkpoint that is whole, None if there is none; damaged ones are named and deleted.

    Raises:
        ValueError: it was made with another recipe; the values that differ are listed.
    """
    for checkpoint in reversed(_complete(folder)):
        if is_whole(checkpoint / _STATE) and is_of_recipe(checkpoint, recipe):
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def widths_in(checkpoint: Path) -> dict[str, float]:
    """Name -> bits of the fake-quantized layers of a checkpoint."""
    start, end = "model.", "._extra_state"
    with safe_open(checkpoint / _STATE, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(start) and key.endswith(end)]  # noqa: SIM118
        return {key.removeprefix(start).removesuffix(end): file.get_tensor(key).item() for key in keys}


def is_of_recipe(folder: Path, recipe: str) -> bool:
    """Whether ``folder/recipe.yaml`` can be read; with one that is damaged the folder is deleted, and that is said.

    Args:
        recipe: YAML, that it must be.

    Raises:
        ValueError: it is another one; the values that differ are listed.
    """
    path = folder / "recipe.yaml"
    try:
        read = read_yaml(path)
        if not isinstance(read, Mapping):
            raise ValueError("no mapping of keys to values")
    except (FileNotFoundError, ValueError) as error:
        print(f"{path} is damaged ({error}); {folder} is deleted, and what was before it is used.", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return False
    saved = without_removed(read)
    if different := differences(saved, yaml.safe_load(recipe)):
        raise ValueError(
            f"{folder} was made with another recipe, so it cannot be continued with this one: {'; '.join(different)}. "
            "Give another --output, or the recipe it was started with."
        )
    return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two mappings differ, one text a value.

    >>> differences({"steps": 4, "adam": {"decay": 0}}, {"steps": 8, "adam": {"decay": 0, "rate": 1}})
    ['steps: 4 -> 8', 'adam.rate: (none) -> 1']
    """
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {_short(a)} -> {_short(b)}")
    return found


def _short(value: Any) -> str:
    return value if value is _ABSENT else f"{value!r:.100}"


def is_whole(path: Path) -> bool:
    """Whether the file is safetensors from end to end; one that is not is named, and deleted."""
    try:
        with safe_open(path, framework="pt"):  # compares the header with the file's length
            return True
    except (SafetensorError, FileNotFoundError) as error:
        print(f"{path} is damaged ({error}); it is deleted, and what was before it is used.", file=sys.stderr)
        path.unlink(missing_ok=True)
        return False


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")
