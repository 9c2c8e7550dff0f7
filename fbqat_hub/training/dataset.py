"""What a recipe can say of its data, checked before any of it is read: pictures, which ``captioned.load_pictures``
reads, or prompts alone, which ``prompts.training_prompts`` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbqat_hub.config import unknown_key_error

# Sets that this package knows by a name of its own -> keys beside path.
NAMED = {"openmoji": {"groups"}, "mjhq-30k": {"count"}, "pixart-eval-30k": {"count"}, "ye-pop": {"count"}}
# Of all others: arguments of datasets.load_dataset, and the names of two columns.
LOADED = {"name", "data_dir", "data_files", "split", "revision", "cache_dir", "image_column", "caption_column"}
# Of every set: the share of its pictures that may be left out because they cannot be used.
SKIP = 0.01
# Of prompts alone: how many pictures the teacher's sampler makes of each, every one from a noise of its own.
SEEDS = 4
_MOST_SEEDS = 10_000
# Builders of datasets that take local files; they are no folders and no Hub ids.
BUILDERS = ("imagefolder", "webdataset", "parquet", "json", "csv", "arrow")


def check_dataset(dataset: Mapping[str, Any]) -> None:
    """Refuse a recipe's ``dataset`` with a key or a value that means nothing. Nothing is looked for on disk.

    Raises:
        ValueError: names the key, and the nearest that is allowed.
    """
    given = [key for key in ("path", "prompts") if key in dataset]
    if len(given) == 2:
        raise ValueError(
            "recipe: dataset has both path, of pictures, and prompts; to train on prompts alone, take path out."
        )
    source = dataset[given[0]] if given else None
    if not isinstance(source, str) or not source.strip():
        raise ValueError(
            f"recipe: dataset is {dict(dataset)}; it needs a path, e.g. {{path: openmoji}}, or prompts, e.g. "
            "{prompts: prompts.txt}."
        )
    of_source = NAMED.get(source, LOADED if given == ["path"] else set())
    allowed = of_source | ({"path", "skip"} if given == ["path"] else {"prompts", "seeds"})
    if unknown := set(dataset) - allowed:
        raise unknown_key_error(f"recipe.dataset ({source})", unknown, allowed)
    for key, value in dataset.items():
        texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if key == "count":
            good, must = type(value) is int and value >= 3, "a whole number of at least 3"
        elif key == "seeds":
            good, must = type(value) is int and 1 <= value <= _MOST_SEEDS, f"a whole number from 1 to {_MOST_SEEDS}"
        elif key == "skip":
            good, must = type(value) in (int, float) and 0 <= value <= 1, "a share from 0 to 1, e.g. 0.01"
        elif key == "groups":
            good, must = texts, "a list of texts, e.g. [Food & Drink]"
        elif key == "data_files":
            named = value.values() if isinstance(value, Mapping) else [value]
            lists = [each if isinstance(each, list) else [each] for each in named]
            good = all(isinstance(file, str) for each in lists for file in each)
            must = "a file, or a list or a mapping of files"
        else:
            good, must = isinstance(value, str) and bool(value.strip()), "text that is not empty"
        if not good:
            raise ValueError(f"recipe: dataset.{key} is {value!r:.80}; it must be {must}.")


def source_of(dataset: Mapping[str, Any]) -> str:
    """Its pictures' path, or where its prompts alone are from."""
    return str(dataset.get("path", dataset.get("prompts")))


def check_local_data(dataset: Mapping[str, Any]) -> None:
    """Refuse data that is not on this machine though its recipe says so, and captions that are no text.

    Raises:
        FileNotFoundError: ``path`` or ``data_dir`` is no folder.
        ValueError: a ``metadata.jsonl`` without rows, or with one that is not JSON, or whose caption is not text (file
            and row are named); an unknown group of OpenMoji; or as ``prompts.training_prompts`` of a file.
    """
    path = source_of(dataset)
    if path == "openmoji":
        from fbqat_hub.training.openmoji import check_groups  # needs the extra `training`

        check_groups(dataset.get("groups", ()))
    if "prompts" in dataset:
        if path not in NAMED:
            from fbqat_hub.training.prompts import training_prompts

            training_prompts(dataset)
        return
    folder = folder_of(dataset)
    for file in sorted(folder.rglob("metadata.jsonl")) if folder else ():
        _check_captions(file, str(dataset.get("caption_column", "caption")))


def folder_of(dataset: Mapping[str, Any]) -> Path | None:
    """The folder on this machine that the data is in, if its recipe names one.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path, data_dir = str(dataset["path"]), dataset.get("data_dir")
    if path in NAMED:
        return None
    folder: Path | None = None
    if Path(path).is_dir():
        folder = Path(path, data_dir or "")
    elif path in BUILDERS and data_dir:
        folder = Path(data_dir)
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise FileNotFoundError(f"recipe: dataset.path is {path!r}; there is no such folder.")
    if folder and not folder.is_dir():
        raise FileNotFoundError(f"recipe: dataset.data_dir is {data_dir!r}; there is no such folder ({folder}).")
    return folder


def _check_captions(file: Path, column: str) -> None:
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, row {number} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number} is {row!r:.80}; it must be an object with file_name.")
        rows.append((number, row))
    if not rows:
        raise ValueError(
            f'{file} has no rows; write one for each picture, e.g. {{"file_name": "a.png", "caption": "a cat"}}, or '
            "delete it where each picture has a text file beside it."
        )
    if not any(column in row for _, row in rows):
        return  # the column has another name, which is said when the columns are known
    for number, row in rows:
        if not isinstance(row.get(column), str):
            raise ValueError(f"{file}, row {number}: {column} is {row.get(column)!r:.80}; it must be text.")
