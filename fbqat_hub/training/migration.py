"""Recipes of older versions in today's words. Those without a ``recipe_version`` are of fbqat_hub 0.1 or before it.

| was | is |
|---|---|
| `start: compensated` | `initialization: gptq` |
| `compensation:` | `gptq:` |
| `schedule: {preset: paper}` | `schedule: {stages: paper}` |
| `rounding: {ewgs: 0.1}` | `optimizer: {ewgs: 0.1}` |
| `learning_rate_schedule`, `warmup_steps`, `clip_learning_rate`, `weight_decay`, `max_grad_norm` | in `optimizer:` |
| `quantization: {weight_granularity: per_group, group_size: 32}` | `quantization: {group_size: 32}` |
| `license`, `license_name`, `license_link`, `dataset_license`, `attribution` | data of the card: `fbqat card --data` |
| empty `start`, `loss_weighting` | left out: the method's |
| `learning_rate: 1e-4`, of all layers | with `optimizer: {learning_rate_unit: absolute, clip_learning_rate: 3.0}` |

What was removed (the soft staircase, ramps, `slope`, `dampening`, 15 levels, one scale for a whole tensor) is dropped
where it was off, and is an error where it was on: `method: fbqat` with a `start` had the soft staircase. The recipe of
a finished run is read all the same (`fbqat_hub.training.recipe.recipe_of_run`): what was trained is stored as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD_FIELDS = ("license", "license_name", "license_link", "dataset_license", "attribution")
_OF_OPTIMIZER = ("learning_rate_schedule", "warmup_steps", "clip_learning_rate", "weight_decay", "max_grad_norm")
# Of recipes whose rates are those of all layers, where they do not say it.
RATES_THEN: dict[str, dict[str, Any]] = {
    "optimizer": {"learning_rate_unit": "absolute", "clip_learning_rate": 3.0},
    "blockwise": {"learning_rate": 2e-4},
}
# (section, key) -> what it was where it was off
_REMOVED = {
    ("schedule", "softness"): (0, 0.0),
    ("schedule", "soft_until"): (0, 0.0),
    ("schedule", "ramp"): ("steps",),
    ("rounding", "slope"): (False,),
    ("rounding", "dampening"): (0, 0.0),
    ("quantization", "weight_narrow"): (False,),
    ("quantization", "weight_granularity"): ("per_channel", "per_group"),
}


def migrated(recipe: Mapping[str, Any], *, finished: bool = False) -> dict[str, Any]:
    """A recipe without a version, with today's names; what it says in them already stays as it is.

    Args:
        finished: as ``without_removed``.

    Raises:
        ValueError: it uses what was removed since.
    """
    if "start" in recipe and recipe.get("method") == "fbqat":
        given = recipe.get("schedule") or {}
        if isinstance(given, Mapping) and not {"softness", "soft_until"} & set(given):
            recipe = {**recipe, "schedule": {**given, "softness": 0.1, "soft_until": 0.9}}  # the default then
    new = without_removed(recipe, finished=finished)
    if finished and isinstance(new.get("calibration", {}), Mapping):  # the default rule then
        new["calibration"] = {"rule": "mean_3sigma", **new.get("calibration", {})}
    for name in CARD_FIELDS:
        new.pop(name, None)
    for name in ("start", "loss_weighting"):
        if new.get(name) == "":
            del new[name]
    for start, initialization in (("nearest", "nearest"), ("compensated", "gptq")):
        if new.get("start") == start:
            del new["start"]
            new.setdefault("initialization", initialization)
    if "compensation" in new:
        new.setdefault("gptq", new.pop("compensation"))
    schedule = new.get("schedule")
    if isinstance(schedule, dict) and "preset" in schedule:
        schedule.setdefault("stages", schedule.pop("preset"))
        schedule.pop("bits", None)  # where a preset ends: at the stored width, as it must
    moved = {name: new.pop(name) for name in _OF_OPTIMIZER if name in new}
    rounding = new.get("rounding")
    if isinstance(rounding, dict):
        del new["rounding"]
        moved |= rounding
    if moved:
        given = new.get("optimizer", {})
        new["optimizer"] = {**moved, **given} if isinstance(given, dict) else given
    for section, then in RATES_THEN.items() if finished or new != recipe else ():
        if isinstance(given := new.get(section, {}), dict):
            new[section] = {**then, **given}
    return new


def without_removed(recipe: Mapping[str, Any], *, finished: bool = False) -> dict[str, Any]:
    """A copy without the settings that were removed.

    Args:
        finished: the recipe says how a finished run was made, and is not to be trained: settings that were on go too.

    Raises:
        ValueError: one was on.
    """
    new = {name: dict(value) if isinstance(value, Mapping) else value for name, value in recipe.items()}
    for (section, key), off in _REMOVED.items():
        found = new.get(section)
        if isinstance(found, dict) and key in found:
            value = found.pop(key)
            if not finished and not any(value is each or (type(value) is type(each) and value == each) for each in off):
                raise ValueError(
                    f"recipe: {section}.{key} is {value!r:.80}; it was removed (docs/method.md says why). To continue "
                    "such a run, use fbqat_hub 0.1. For a new one take it out, or write the recipe anew if it is of "
                    "fbqat_hub 0.1 and does not name it."
                )
    return new
