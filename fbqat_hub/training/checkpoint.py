"""Training checkpoints: safetensors only, written beside and renamed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

_KEEP = 2


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: str) -> None:
    """Write ``folder/step-<step>`` with the model's and the optimizer's tensors, and keep the newest two.

    Args:
        step: optimizer steps done.
        recipe: the recipe as text, kept to refuse a resume with another one.
    """
    tensors = {f"model.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in state.items()})
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


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: str) -> int:
    """Restore the newest checkpoint; returns the steps done, 0 if there is none.

    Raises:
        ValueError: the checkpoint was made with another recipe, or its file is damaged.
    """
    checkpoints = _complete(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    if yaml.safe_load((newest / "recipe.yaml").read_text()) != yaml.safe_load(recipe):
        raise ValueError(
            f"{newest} was made with another recipe, so it cannot be continued with this one. "
            "Give another --output, or the recipe it was started with."
        )
    model_state: dict[str, torch.Tensor] = {}
    optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _tensors(newest / "state.safetensors"):
        kind, _, rest = key.partition(".")
        if kind == "model":
            model_state[rest] = value
        else:
            index, _, name = rest.partition(".")
            optimizer_state.setdefault(int(index), {})[name] = value
    model.load_state_dict(model_state)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    return int(newest.name.removeprefix("step-"))


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} to continue from an older one.") from None


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")
