"""What a downloaded folder must be before anything in it is loaded: SECURITY.md says why, test by test."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

LIBRARIES = ("diffusers", "transformers")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# Configs are a few KiB, index files of sharded checkpoints a few hundred.
_LARGEST_JSON = 2**22
_LARGEST_YAML = 2**20
# A vocabulary of 2^18 is the largest number of a model in use.
_LARGEST_NUMBER = 2**20
# Latents a side, of which denoisers make a table of positions: 512 x 512 x 1536 x 8 bytes = 3 GiB. SD3.5 has 384.
_LARGEST_SIDE = 512


def read_json(path: Path, largest: int = _LARGEST_JSON) -> Any:
    """A JSON file of at most ``largest`` bytes.

    Raises:
        ValueError: larger, nested too deep, or not JSON; the file is named.
    """
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"{path} has {size} bytes; a file of this kind has at most {largest}.")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read.") from None
    except ValueError as error:  # of the syntax, or of the encoding
        raise ValueError(f"{path} is not JSON ({error}).") from None


def read_yaml(path: Path) -> Any:
    """A YAML file of plain data, of at most 1 MiB, without aliases: a few of them can stand for any amount of data.

    Raises:
        ValueError: larger, nested too deep, or not such a file; the file is named.
    """
    size = path.stat().st_size
    if size > _LARGEST_YAML:
        raise ValueError(f"{path} has {size} bytes; a file of this kind has at most {_LARGEST_YAML}.")
    try:
        return yaml.load(path.read_bytes(), _PlainLoader)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read.") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date that is none, say
        raise ValueError(f"{path} is not YAML: {error}") from None


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias ({self.peek_event().anchor}); write out what it stands for.")
        return super().compose_node(parent, index)


def check_pipeline(folder: Path) -> dict[str, tuple[str, str]]:
    """Read what says how large the parts of a pipeline are, and refuse what is not one, before any of it is loaded.

    Checked are links, ``model_index.json``, the headers of all safetensors files against the files' lengths, and the
    numbers in ``config.json`` of every model.

    Returns:
        Component -> (library, class), without those that the pipeline goes without.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    _check_files(folder)
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{folder / 'model_index.json'} names no pipeline class; give a diffusers pipeline's folder.")
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or value[0] not in LIBRARIES or not isinstance(value[1], str):
            raise ValueError(
                f"{folder / 'model_index.json'}: {name} is {value!r}; it must be a class of {' or '.join(LIBRARIES)}, "
                "since no other code is run."
            )
        if os.sep in name or name == "..":
            raise ValueError(f"{folder / 'model_index.json'}: {name!r} is no name of a component.")
        components[name] = (value[0], value[1])
    for name in components:
        check_model(folder / name)
    return components


def is_model(folder: Path) -> bool:
    """True of a component with weights; a scheduler or a tokenizer has none."""
    return (folder / "config.json").is_file()


def _check_files(folder: Path) -> None:
    """No links out of the folder, but those of the Hub's cache to its own blobs; no pipes or devices."""
    home = os.path.realpath(folder)
    homes = [home]
    if Path(home).parent.name == "snapshots":
        homes.append(str(Path(home).parents[1] / "blobs"))
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            target = os.path.realpath(path)
            if path.is_symlink() and not any(Path(target).is_relative_to(each) for each in homes):
                raise ValueError(f"{path} is a link out of the folder; put the file itself there.")
            if not path.is_file() and not path.is_dir():
                raise ValueError(f"{path} is neither a file nor a folder; remove it.")


def check_model(folder: Path) -> None:
    """The part of ``check_pipeline`` that is about one component's folder.

    Raises:
        ValueError: as ``check_pipeline``.
    """
    tensors = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:  # compares its header with the file's length
                tensors += len(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}). Download or convert it again.") from None
    for path in sorted(folder.glob("*.index.json")):
        read_json(path)
    if not is_model(folder):
        return
    if not tensors:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        raise ValueError(
            f"{folder} has no safetensors"
            + (f", but {', '.join(pickles[:3])}, which could run code when read" if pickles else "")
            + "; only safetensors are loaded."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} holds no object of keys and values.")
    for key, value in _leaves(config):
        _check_number(folder, key, value, tensors)


def _check_number(folder: Path, key: str, value: Any, tensors: int) -> None:
    """What a model's constructor would spend time or memory on. A list counts by its length."""
    number = len(value) if isinstance(value, list) else value
    if not isinstance(number, int | float) or not math.isfinite(number):
        return
    if isinstance(value, list) or "layers" in key:
        largest, why = tensors, f", since the weights are {tensors} tensors"
    elif folder.name == "transformer" and key in ("sample_size", "pos_embed_max_size"):
        largest, why = _LARGEST_SIDE, ""
    else:
        largest, why = _LARGEST_NUMBER, ""
    if number > largest:
        what = "the length of " * isinstance(value, list) + key
        raise ValueError(f"{folder / 'config.json'}: {what} is {number}; at most {largest} is allowed{why}.")


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, number), and (key, list) for every list; of an item of a list the key is that of the list."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, name)
    elif isinstance(tree, list):
        yield key, tree
        for value in tree:
            yield from _leaves(value, key)
    else:
        yield key, tree
