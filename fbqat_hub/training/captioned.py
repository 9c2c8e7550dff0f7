"""The captioned pictures of a recipe: from this package, from a folder, or by `datasets`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from fbqat_hub.inputs import read_text
from fbqat_hub.training.dataset import NAMED, check_local_data, folder_of
from fbqat_hub.training.openmoji import load_openmoji
from fbqat_hub.training.pictures import undecoded
from fbqat_hub.training.prompts import load_prompts

# What `datasets` calls the columns of WebDataset shards, where a recipe does not say: the endings of the files in them.
_COLUMNS = {"webdataset": ("jpg", "txt")}
_TABLES = ("jsonl", "csv", "parquet")
# Also of formats that Pillow may lack: what cannot be read is left out by name, and counted.
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl")


def load_pictures(dataset: Mapping[str, Any], side: int) -> datasets.DatasetDict:
    """The data set of a recipe with the splits train, validation, test and the columns ``image``, ``caption``; pictures
    as they are stored (`pictures.picture_of` reads one), but for OpenMoji's.

    Args:
        dataset: {"path": "openmoji"}, perhaps with "groups" (see ``load_openmoji``); {"path": "ye-pop"} or another set
            of `prompts.PROMPT_SETS`, perhaps with "count", of pictures; or arguments of ``datasets.load_dataset`` and
            the names of its columns, ``image_column`` and ``caption_column``; or a folder with a text file beside each
            picture. Splits that it lacks are cut from train, 2.5% each, seed 1234.
        side: of pictures that are drawn here (OpenMoji), in pixels; others have their own size.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: no train split, no such column, a split without pictures, or a caption that is not text.
    """
    check_local_data(dataset)
    name, folder = dataset["path"], folder_of(dataset)
    if name == "openmoji":
        return load_openmoji(side, dataset.get("groups", ()))
    if name in NAMED:
        image_column, caption_column = "image", "prompt"
        data: Any = load_prompts(name, dataset.get("count"), images=True)
    elif folder and _has_texts_beside(folder):
        image_column, caption_column = "image", "caption"
        data = _with_texts_beside(folder)
    else:
        options = {key: value for key, value in dataset.items() if key != "skip"}
        of_image, of_caption = _COLUMNS.get(name, ("image", "caption"))
        image_column = options.pop("image_column", of_image)
        caption_column = options.pop("caption_column", of_caption)
        data = _loaded(options)
    if isinstance(data, datasets.Dataset):
        data = datasets.DatasetDict(train=data)
    if "train" not in data:
        raise ValueError(f"data set {name!r} has no split 'train'; it has {', '.join(data)}.")
    for column in (image_column, caption_column):
        if column not in data["train"].column_names:
            if column == "image" and folder and not pictures_in(folder):
                raise ValueError(f"{folder} holds no pictures ({', '.join(_ENDINGS)}); give a folder of them.")
            raise ValueError(
                f"data set {name!r} has no column {column!r}; it has {', '.join(data['train'].column_names)}. Name "
                "them in the recipe: dataset.image_column, dataset.caption_column."
            )
    data = data.select_columns([image_column, caption_column])
    data = data.rename_columns({image_column: "image", caption_column: "caption"})
    for split, rows in data.items():
        for row, caption in enumerate(rows["caption"]):
            if not isinstance(caption, str):
                raise ValueError(f"data set {name!r}, {split}, row {row + 1}: caption is {caption!r:.80}, not text.")
    data = datasets.DatasetDict({split: undecoded(rows, "image", name) for split, rows in data.items()})
    if len(data["train"]) < 3:
        raise ValueError(f"data set {name!r} has {len(data['train'])} training pictures; give at least 3.")
    for split in ("validation", "test"):
        if split not in data:
            parts = data["train"].train_test_split(test_size=0.025, seed=1234)
            data["train"], data[split] = parts["train"], parts["test"]
        if not len(data[split]):
            raise ValueError(f"data set {name!r} has an empty split {split!r}.")
    return data


def _loaded(options: dict[str, Any]) -> Any:
    """``datasets.load_dataset``; what it says of data that it cannot read follows the data set's name and files."""
    try:
        return datasets.load_dataset(**options)
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # the disk is full, say
            raise cause from None
        given = [f"{key}: {options[key]}" for key in ("data_dir", "data_files") if options.get(key)]
        named = f"{options['path']!r}" + (f" ({', '.join(given)})" if given else "")
        raise ValueError(f"data set {named} cannot be loaded: {type(cause).__name__}: {cause}") from error


def _has_texts_beside(folder: Path) -> bool:
    """Captions in ``name.txt`` beside the pictures, and none in a table, which would come first."""
    if any(next(folder.rglob(f"metadata.{ending}"), None) for ending in _TABLES):
        return False
    return any(picture.with_suffix(".txt").is_file() for picture in pictures_in(folder))


def _with_texts_beside(folder: Path) -> datasets.DatasetDict:
    """A picture without a text has an empty caption. Folders named as a split hold it, all others are of train."""
    rows: dict[str, dict[str, list[str]]] = {}
    for picture in pictures_in(folder):
        top = picture.relative_to(folder.resolve()).parts[0]
        of_split = rows.setdefault(top if top in ("validation", "test") else "train", {"image": [], "caption": []})
        beside = picture.with_suffix(".txt")
        of_split["image"].append(str(picture))
        of_split["caption"].append(" ".join(read_text(beside).split()) if beside.is_file() else "")
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(found, features) for split, found in rows.items()})


def captions_in(folder: Path) -> int | None:
    """How many captioned pictures a folder holds: rows of its tables (``metadata.*``), or picture files; None where
    there is neither, as of a folder of parquet files or archives."""
    tables = [table for ending in _TABLES for table in folder.rglob(f"metadata.{ending}")]
    return sum(map(_rows_in, tables)) if tables else len(pictures_in(folder)) or None


def _rows_in(table: Path) -> int:
    if table.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]  # of datasets

        return int(parquet.read_metadata(table).num_rows)
    if table.suffix == ".csv":
        with table.open(newline="", encoding="utf-8-sig") as file:
            return max(0, sum(1 for row in csv.reader(file) if row) - 1)  # but that of the columns' names
    with table.open("rb") as file:
        return sum(1 for line in file if line.strip())


def pictures_in(folder: Path) -> list[Path]:
    """The picture files in a folder and below, absolute, in the order of their names."""
    files = sorted(folder.resolve().rglob("*"))
    return [file for file in files if file.suffix.lower() in _ENDINGS and not file.name.startswith(".")]
