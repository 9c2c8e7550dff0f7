"""The configs of a recipe's teacher, and its parts without numbers: what a plan needs, and no weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fbqat_hub.components import INDEX, quiet, read_index
from fbqat_hub.hub.client import step
from fbqat_hub.hub.names import repo_and_revision
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.untrusted import read_json

_LARGEST_CONFIG = 2**24
# Component -> its config, with the name of its class as "class".
Configs = Mapping[str, Mapping[str, Any]]


def configs_of(teacher: str) -> Configs:
    """The configs of a pipeline's models: of a folder, of a base that this package knows, or of a Hub id.

    Of a Hub id that is not known only ``model_index.json`` and the ``config.json`` files are downloaded.

    Raises:
        HubError: the Hub refused or failed.
        ValueError: no ``model_index.json`` that names classes.
    """
    repo, revision = repo_and_revision(teacher)
    if repo in _known():
        return _known()[repo]
    folder = Path(resolve_teacher(teacher))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with step(f"look up the configs of {teacher}, which is no folder here"):
            patterns = [INDEX, "*/config.json"]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    found = {}
    for name, part in read_index(folder)[1].items():
        path = folder / name / "config.json"
        if path.is_file():
            found[name] = {**read_json(path, _LARGEST_CONFIG), "class": part.class_name}
    return found


def build(config: Mapping[str, Any]) -> Any:
    """A model of this config, its numbers random: on the device that is set, meta say, and in its mode.

    Raises:
        ValueError: neither diffusers nor transformers has a model of its class.
    """
    import diffusers
    import transformers

    name = config["class"]
    settings = {key: value for key, value in config.items() if key != "class"}
    if hasattr(diffusers, name):
        return getattr(diffusers, name).from_config(settings)
    kind: Any = getattr(transformers, name, None)
    if not hasattr(kind, "config_class"):
        raise ValueError(f"{name} is no model of diffusers or transformers; a plan cannot be made of it.")
    return kind(kind.config_class(**settings))


def build_on_meta(config: Mapping[str, Any]) -> Any:
    """``build`` without numbers."""
    with torch.device("meta"), quiet():
        return build(config)


@functools.cache
def parameters(teacher: str) -> dict[str, int]:
    """Component -> number of its parameters."""
    counts = {}
    for name, config in configs_of(teacher).items():
        model: nn.Module = build_on_meta(config)
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
    return counts


@functools.cache
def _known() -> dict[str, Configs]:
    known: dict[str, Configs] = yaml.safe_load(Path(__file__).with_name("bases.yaml").read_text(encoding="utf-8"))
    return {name: configs for name, configs in known.items() if name != "parts"}
