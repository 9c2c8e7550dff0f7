"""Reading what a stranger made: bounds on JSON, YAML, links and numbers. SECURITY.md says why, test by test."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

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
    A key that stands twice is refused, since YAML would take the last one without a word.

    Raises:
        ValueError: larger, nested too deep, or not such a file; the file is named.
    """
    size = path.stat().st_size
    if size > _LARGEST_YAML:
        raise ValueError(f"{path} has {size} bytes; a file of this kind has at most {_LARGEST_YAML}.")
    try:
        return plain_yaml(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read.") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date that is none, say
        raise ValueError(f"{path} is not YAML: {error}") from None


def plain_yaml(text: str | bytes) -> Any:
    """YAML as `read_yaml` takes it.

    >>> plain_yaml("[10, 1_000, 0x10]")
    [10, 1000, 16]

    Raises:
        yaml.YAMLError: it is not such text.
        OtherNumberError: a number that YAML 1.1 reads in base 8 or 60.
        RecursionError, ValueError: nested too deep, or a date or number that is none.
    """
    return yaml.load(text, _PlainLoader)


class OtherNumberError(ValueError):
    """A number that YAML reads as another one than is written: 010 as 8, 12:30 as 750."""


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias ({self.peek_event().anchor}); write out what it stands for.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.YAMLError(f"{name} stands twice, again on line {key.start_mark.line + 1}; give it once.")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        whole = node.tag.endswith(":int")
        read = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if ":" in node.value or (whole and re.match(r"[-+]?0[0-9_]", node.value)):
            raise OtherNumberError(
                f"{node.value:.50} is {read:g} to YAML, which reads it in base {60 if ':' in node.value else 8}; write "
                "the number without it, or text in quotes."
            )
        return read


for _tag in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _PlainLoader.construct_number)


def check_links(folder: Path) -> None:
    """Refuse links out of a folder, but those of the Hub's cache to its own blobs, and pipes and devices in it.

    Raises:
        ValueError: names the first one.
    """
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


def check_config(path: Path, tensors: int | None = None) -> dict[str, Any]:
    """Refuse a configuration with numbers that a constructor would spend endless time or memory on, or with NaN.

    Args:
        path: a model's ``config.json``, or ``scheduler_config.json``.
        tensors: how many a model's weights are.

    Returns:
        What it holds.

    Raises:
        ValueError: the file is missing, is not an object, or has a number out of bounds; names file, key and number.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}. Download or convert it again.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object of keys and values.")
    for key, value in _leaves(config):
        _check_number(path, key, value, tensors)
    return config


def _check_number(path: Path, key: str, value: Any, tensors: int | None) -> None:
    """What a constructor would spend time or memory on, or a sampler make NaN of. A list counts by its length."""
    number = len(value) if isinstance(value, list) else value
    if not isinstance(number, int | float):
        return
    if isinstance(number, float) and math.isnan(number):
        raise ValueError(f"{path}: {key} is NaN, no number. Download or convert it again.")
    if tensors is not None and (isinstance(value, list) or "layers" in key):
        largest, why = tensors, f", since the weights are {tensors} tensors"
    elif path.parent.name == "transformer" and key in ("sample_size", "pos_embed_max_size"):
        largest, why = _LARGEST_SIDE, ""
    else:
        largest, why = _LARGEST_NUMBER, ""
    if number > largest:  # the least may be -Infinity: lambda_min_clipped of DPM-Solver is
        what = "the length of " * isinstance(value, list) + key
        raise ValueError(f"{path}: {what} is {number}; at most {largest} is allowed{why}.")


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
