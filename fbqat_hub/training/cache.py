"""Latents and prompt embeddings of a data set, computed once and kept on disk.

A split is a folder of safetensors files of up to ``SHARD`` samples. A file is written beside and renamed, so an
interrupted run goes on with the first one missing. Reading maps the files; nothing is loaded until it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fbqat_hub.families import Family, get_family
from fbqat_hub.files import whole
from fbqat_hub.pictures import pixels
from fbqat_hub.progress import each
from fbqat_hub.training.dataset import NAMED, check_local_data
from fbqat_hub.training.openmoji import default_cache_dir, load_openmoji
from fbqat_hub.training.pictures import training_picture, undecoded
from fbqat_hub.training.prompts import load_prompts
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.teachers import resolve_teacher

SHARD = 256
SPLITS = ("train", "validation", "test")


class CachedSplit:
    """One split: latents [N, C, H, W] and conditioning tensors [N, ...], indexable by sample."""

    def __init__(self, folder: Path) -> None:
        self.captions: list[str] = json.loads((folder / "captions.json").read_text())
        self._shards: list[dict[str, Tensor]] = []
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditioning of the samples ``indices`` (int64 [B])."""
        rows = [divmod(int(index), SHARD) for index in indices]
        stacked = {
            name: torch.stack([self._shards[shard][name][row] for shard, row in rows]) for name in self._shards[0]
        }
        return stacked.pop("latents"), stacked


def cached_splits(recipe: Recipe, pipeline: Any) -> dict[str, CachedSplit]:
    """Latents and conditioning of the recipe's data under its teacher, from disk or encoded now."""
    data = load_pictures(recipe.dataset, max(recipe.size))
    family, folder = get_family(recipe.family), cache_folder(recipe)
    return build_cache(pipeline, family, data, recipe.size, recipe.generation, folder)


def cache_folder(recipe: Recipe) -> Path:
    """Where what the teacher makes of the recipe's data is kept."""
    key = cache_key(resolve_teacher(recipe.teacher), recipe.dataset, recipe.size, recipe.generation)
    return default_cache_dir() / "encoded" / f"{recipe.family}-{key}"


def load_pictures(dataset: Mapping[str, Any], side: int) -> datasets.DatasetDict:
    """The data set of a recipe with the splits train, validation, test and the columns ``image``, ``caption``; pictures
    as they are stored (`pictures.picture_of` reads one), but for OpenMoji's.

    Args:
        dataset: {"path": "openmoji"}, perhaps with "groups" (see ``load_openmoji``); {"path": "ye-pop"} or another set
            of `prompts.PROMPT_SETS`, perhaps with "count", of pictures; or arguments of ``datasets.load_dataset`` and
            the names of its columns, ``image_column`` and ``caption_column``. Splits that it lacks are cut from train,
            2.5% each, seed 1234.
        side: of pictures that are drawn here (OpenMoji), in pixels; others have their own size.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: no train split, no such column, a split without pictures, or a caption that is not text.
    """
    check_local_data(dataset)
    name = dataset["path"]
    if name == "openmoji":
        return load_openmoji(side, dataset.get("groups", ()))
    if name in NAMED:
        image_column, caption_column = "image", "prompt"
        data: Any = load_prompts(name, dataset.get("count"), images=True)
    else:
        options = dict(dataset)
        image_column, caption_column = options.pop("image_column", "image"), options.pop("caption_column", "caption")
        data = _loaded(options)
    if isinstance(data, datasets.Dataset):
        data = datasets.DatasetDict(train=data)
    if "train" not in data:
        raise ValueError(f"data set {name!r} has no split 'train'; it has {', '.join(data)}.")
    for column in (image_column, caption_column):
        if column not in data["train"].column_names:
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
    """``datasets.load_dataset``; what it says of data that it cannot read follows the name of the data set."""
    try:
        return datasets.load_dataset(**options)
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # the disk is full, say
            raise cause from None
        raise ValueError(f"data set {options['path']!r} cannot be loaded: {type(cause).__name__}: {cause}") from error


def build_cache(
    pipeline: Any,
    family: Family,
    data: datasets.DatasetDict,
    size: tuple[int, int],
    generation: Mapping[str, Any],
    root: Path,
) -> dict[str, CachedSplit]:
    """Encode every split, or take it from ``root`` when the same pipeline and data were encoded before.

    Args:
        size: (height, width) of the training pictures; others are scaled, and cut at the middle.
    """
    return {split: _build_split(pipeline, family, data[split], size, generation, root / split) for split in SPLITS}


def cache_key(teacher: str, dataset: Mapping[str, Any], size: Any, generation: Mapping[str, Any]) -> str:
    """A short name for what a cache depends on; local folders count by the names, sizes and times of their files."""
    folders = [_files(teacher), *(_files(dataset.get(key)) for key in ("path", "data_dir"))]
    text = json.dumps([teacher, folders, dict(dataset), size, dict(generation)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _files(folder: str | None) -> list[tuple[str, int, int]]:
    """Of a local folder, else nothing."""
    root = Path(folder) if folder else None
    if root is None or not root.is_dir():
        return []
    files = [(path, path.stat()) for path in sorted(root.rglob("*")) if path.is_file()]
    return [(str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns) for path, stat in files]


@torch.no_grad()
def _build_split(
    pipeline: Any,
    family: Family,
    data: datasets.Dataset,
    size: tuple[int, int],
    generation: Mapping[str, Any],
    folder: Path,
) -> CachedSplit:
    folder.mkdir(parents=True, exist_ok=True)
    captions = folder / "captions.json"
    starts = range(0, len(data), SHARD)
    missing = [start for start in starts if not _shard_path(folder, start).exists()]
    for start in each(missing, f"encode {folder.name}", "shard"):
        rows = data[start : start + SHARD]
        parts = []
        for first in range(0, len(rows["caption"]), 32):
            images = [
                training_picture(image, size[::-1], f"training data, {folder.name}, row {start + first + row}")
                for row, image in enumerate(rows["image"][first : first + 32], 1)
            ]
            part = family.encode_prompts(pipeline, rows["caption"][first : first + 32], generation)
            part["latents"] = family.encode_images(pipeline, pixels(images).float() / 127.5 - 1)
            part |= family.picture_conditioning(part["latents"])
            parts.append(part)
        tensors = {name: torch.cat([part[name] for part in parts]).cpu().contiguous() for name in parts[0]}
        with whole(_shard_path(folder, start)) as partial:
            save_file(tensors, partial)
    if not captions.exists():
        with whole(captions) as partial:
            partial.write_text(json.dumps(list(data["caption"])))
    return CachedSplit(folder)


def _shard_path(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.safetensors"
