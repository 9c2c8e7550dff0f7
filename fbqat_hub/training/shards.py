"""Rows of tensors, too many for memory, in safetensors files of bounded size.

A kind of rows, "pictures" say, is the files ``pictures-000000000.safetensors`` and so on of a folder, each named by the
first item that it was made of. A file is written beside and renamed, so an interrupted run goes on with the first one
missing. Its header says which items it is of, and safetensors notices that a file was cut. Reading maps the files: the
system loads what is used, and takes it back when memory is short.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fbqat_hub.files import whole
from fbqat_hub.progress import Progress

# The batch that takes a file to so many bytes is its last.
SHARD_BYTES = 2**28
# Items that are made at a time. Not the caller's choice: the last bits of a float depend on it.
BATCH = 32
_FORMAT = "fbqat rows 1"


@dataclass(frozen=True)
class Rows:
    """What was made of some items.

    Attributes:
        tensors: [N, ...]; N need not be the number of the items, and of no rows there may be no tensors.
        notes: about them, as JSON can hold it.
    """

    tensors: Mapping[str, Tensor]
    notes: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Shard(Rows):
    """The rows of one file, mapped. It was made of the items ``first`` to ``stop``, without the latter."""

    first: int = 0
    stop: int = 0


def fill(folder: Path, kind: str, total: int, make: Callable[[range], Rows], *, most: int = sys.maxsize) -> list[Shard]:
    """The shards of items 0 to ``total``, in order, from ``folder``; what is missing there is made.

    A file that is cut, or that something else wrote, is named and made anew.

    Args:
        make: the rows of up to 32 items that follow each other.
        most: items of a shard, however small they are.

    Raises:
        OSError: the disk is full, say; shards that were written before stay.
    """
    known = {path.name: shard for path in sorted(folder.glob(f"{kind}-*.safetensors")) if (shard := _read(path))}
    done = sum(shard.stop - shard.first for shard in known.values())
    shards: list[Shard] = []
    with Progress(f"encode {folder.name}, {kind}", total, "item", start=min(done, total)) as progress:
        while (first := shards[-1].stop if shards else 0) < total:
            path = folder / f"{kind}-{first:09d}.safetensors"
            if path.name not in known:
                _write(path, first, min(total, first + most), make, progress)
            shard = known.get(path.name) or _read(path)
            assert shard  # written just now
            shards.append(shard)
    return shards


def _write(path: Path, first: int, total: int, make: Callable[[range], Rows], progress: Progress) -> None:
    """Of items from ``first`` on, until there are enough for a file."""
    parts: list[Rows] = []
    stop = first
    while stop < total and sum(value.nbytes for part in parts for value in part.tensors.values()) < SHARD_BYTES:
        items = range(stop, min(stop + BATCH, total))
        parts.append(make(items))
        stop = items.stop
        progress.update(len(items))
    names = next((part.tensors for part in parts if part.tensors), {})
    tensors = {
        name: torch.cat([part.tensors[name] for part in parts if part.tensors]).cpu().contiguous() for name in names
    }
    notes = json.dumps([note for part in parts for note in part.notes])
    with whole(path) as partial:
        save_file(tensors, partial, {"format": _FORMAT, "first": str(first), "stop": str(stop), "notes": notes})


def _read(path: Path) -> Shard | None:
    """None if the file is not a whole shard of that name; then it is gone, and was named."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT or not path.stem.endswith(f"-{int(header['first']):09d}"):
                raise ValueError("it is not what the cache wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Shard(tensors, json.loads(header["notes"]), int(header["first"]), int(header["stop"]))
    except (SafetensorError, KeyError, ValueError) as error:
        print(f"{path} is damaged ({error}); it is made anew.", file=sys.stderr)
        path.unlink()
        return None
