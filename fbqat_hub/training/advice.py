"""Whether a run fits its GPUs, and which settings make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fbqat_hub.training.costs import Costs, costs
from fbqat_hub.training.gpus import Gpus
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.sharding import needs_whole_layers

# What makes a step smaller, the least harmful first; None is the largest that fits.
_CHANGES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"mixed_precision": "bf16"},
    {"micro_batch_size": None},
    {"optimizer.moment_bits": 8},
    {"micro_batch_size": None},
    {"train_layers": "attention", "micro_batch_size": 1},
)
# The same of block-wise training; of batch sizes above 8 its rates were not tried.
_BLOCK_CHANGES: tuple[dict[str, Any], ...] = (
    {"mixed_precision": "bf16"},
    {"batch_size": 8},
    {"gradient_checkpointing": True},
    {"blockwise.tuning_steps": 0},
    {"optimizer.moment_bits": 8},
    {"batch_size": 1},
)
# With layers shared out to several GPUs (FSDP2).
_SHARED_OUT = {"gradient_checkpointing": True, "mixed_precision": "bf16", "micro_batch_size": 1}


def advice(found: Costs, gpus: Gpus) -> list[tuple[str, Costs]]:
    """Changes of the recipe, each with those before it, until it fits or none is left.

    Returns:
        Of each, KEY=VALUE as ``--set`` takes it, and what the run costs with it.
    """
    budget, found = gpus.budget, replace(found, devices=gpus.count)
    if found.encoding > budget:
        return []

    def fitting(now: Costs, change: dict[str, Any]) -> dict[str, Any] | None:
        if change == {"micro_batch_size": None}:
            change = {"micro_batch_size": now.largest_micro_batch(budget - buckets(now, gpus))}
        return None if change.get("micro_batch_size") == 0 else change

    return _advised(found, _CHANGES, lambda now: on_device(now, gpus) <= budget, fitting)


def block_advice(found: Costs, gpus: Gpus) -> list[tuple[str, Costs]]:
    """As ``advice``, of block-wise training, which uses one of the devices."""

    def fitting(now: Costs, change: dict[str, Any]) -> dict[str, Any] | None:
        larger = change.get("batch_size", 0) >= now.recipe.batch_size
        without_effect = "gradient_checkpointing" in change and not now.tuning
        return None if larger or without_effect else change

    return _advised(found, _BLOCK_CHANGES, lambda now: on_one_device(now) <= gpus.budget, fitting)


def _advised(
    found: Costs,
    changes: Iterable[dict[str, Any]],
    fits: Callable[[Costs], bool],
    fitting: Callable[[Costs, dict[str, Any]], dict[str, Any] | None],
) -> list[tuple[str, Costs]]:
    """``advice`` among these changes.

    Args:
        fitting: a change, as it is made to what there is by then; None where it would be none.
    """
    tried: list[tuple[str, Costs]] = []
    for each in changes:
        if fits(found):
            break
        change = fitting(found, each)
        if change is None or ("mixed_precision" in change and found.recipe.half):
            continue
        try:
            changed = _changed(found.recipe, change)
            if changed == found.recipe:
                continue
            found = replace(costs(changed), devices=found.devices)
        except ValueError:  # not with the recipe's other settings
            continue
        tried.append((as_settings(change), found))
    return tried


def _changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """With the fields of ``change``, those of a section as SECTION.NAME."""
    given: dict[str, Any] = {}
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        given[section or key] = replace(getattr(recipe, section), **{name: value}) if section else value
    return replace(recipe, **given)


def as_settings(change: Mapping[str, Any]) -> str:
    """KEY=VALUE of each, as ``--set`` takes it."""
    return " ".join(f"{name}={_yaml(value)}" for name, value in change.items())


def on_device(found: Costs, gpus: Gpus) -> int:
    """Bytes on each GPU, at the worst moment."""
    return max(found.memory.peak + buckets(found, gpus), found.encoding)


def on_one_device(found: Costs) -> int:
    """Bytes on the device of block-wise training, at the worst moment."""
    return max(found.blocks.block, found.largest_part, found.tuning)


def fits_at_all(found: Costs, gpus: Gpus) -> bool:
    """With a batch of one."""
    return max(found.memory_of_one.peak + buckets(found, gpus), found.encoding) <= gpus.budget


def in_parts(found: Costs, gpus: Gpus) -> Costs | None:
    """The costs with every layer shared out to the GPUs (FSDP2), and with what makes them small there.

    None of one GPU, of what needs layers whole, and of a recipe that cannot have these settings.
    """
    try:
        changed = _changed(found.recipe, _SHARED_OUT)
    except ValueError:
        return None
    if gpus.count == 1 or needs_whole_layers(changed):
        return None
    return replace(costs(changed), devices=gpus.count)


def block_by_block(recipe: Recipe) -> tuple[str, Costs]:
    """The settings that make a recipe one of block-wise training, as ``--set`` takes them, and what it costs then.

    Raises:
        ValueError: there are none, for the reason that it says.
    """
    change: dict[str, Any] = {
        "training": "blockwise",
        "mixed_precision": "bf16",
        "batch_size": min(8, recipe.batch_size),
    }
    if recipe.keep_stages:
        change["keep_stages"] = []
    if recipe.quantization.group_size and recipe.blockwise.tuning_steps:
        change["blockwise.tuning_steps"] = 0
    return as_settings(change), costs(_changed(recipe, change))


def launched(gpus: Gpus, name: str) -> list[str]:
    """The command that trains a recipe with FSDP2, on two lines."""
    settings = as_settings(_SHARED_OUT)
    start = f"accelerate launch --use_fsdp --fsdp_version 2 --num_processes {gpus.count} -m fbqat_hub.cli train"
    return [f"{start} {name} \\", f"  --output runs/{name} --set {settings}"]


def buckets(found: Costs, gpus: Gpus) -> int:
    """DistributedDataParallel copies gradients into buckets."""
    return found.memory.student if gpus.count > 1 else 0


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
