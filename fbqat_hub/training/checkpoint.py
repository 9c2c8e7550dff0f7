"""Training checkpoints: safetensors only, written beside and renamed."""

from __future__ import annotations

import shutil
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

_KEEP = 2
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
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial / "state.safetensors")
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
    """Restore the newest checkpoint; returns the steps done, 0 if there is none.

    Raises:
        ValueError: the checkpoint was made with another recipe (the values that differ are listed), or its file is
            damaged.
    """
    checkpoints = _complete(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    check_same_recipe(newest, recipe)
    model_state: dict[str, torch.Tensor] = {}
    optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
    scaler_state: dict[str, float | int] = {}
    for key, value in read_tensors(newest / "state.safetensors").items():
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


def saved_widths(folder: Path) -> dict[str, float] | None:
    """Name -> bit width of every fake-quantized layer of the newest checkpoint; None if there is none.

    Raises:
        ValueError: its file is damaged.
    """
    checkpoints = _complete(folder)
    if not checkpoints:
        return None
    path, first, last = checkpoints[-1] / "state.safetensors", "model.", "._extra_state"
    try:
        with safe_open(path, "pt") as tensors:
            found = [key for key in tensors.keys() if key.startswith(first) and key.endswith(last)]  # noqa: SIM118
            return {key.removeprefix(first).removesuffix(last): tensors.get_tensor(key).item() for key in found}
    except SafetensorError as error:
        raise _damaged(path, error) from None


def check_same_recipe(folder: Path, recipe: str) -> None:
    """ValueError that lists the values which differ, where ``folder/recipe.yaml`` is not the ``recipe``, YAML."""
    saved = without_removed(yaml.safe_load((folder / "recipe.yaml").read_text()))
    if different := differences(saved, yaml.safe_load(recipe)):
        raise ValueError(
            f"{folder} was made with another recipe, so it cannot be continued with this one: {'; '.join(different)}. "
            "Give another --output, or the recipe it was started with."
        )


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


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, or ValueError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} is damaged ({error}); delete {path.parent} to continue from an older one.")


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")
