"""Latents and prompt embeddings of a data set, computed once and kept on disk.

A split is a folder with shards (`fbqat_hub.training.shards`) of its pictures' latents, and of the embeddings of its
distinct captions. Of prompts alone the latents are those that the teacher's sampler passes through
(`fbqat_hub.training.states`). A run in half precision keeps both in that precision, and the embeddings without their
padding; a run in float32 keeps what was computed. Pictures that cannot be used are left out, and listed in
``left-out.txt``.
"""

from __future__ import annotations

import bisect
import copy
import glob
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.families import Family, get_family
from fbqat_hub.files import whole
from fbqat_hub.pictures import pixels
from fbqat_hub.training.captioned import load_pictures
from fbqat_hub.training.dataset import SEEDS, SKIP
from fbqat_hub.training.embeddings import Embeddings, without_padding
from fbqat_hub.training.pictures import name_of, training_picture
from fbqat_hub.training.prompts import training_prompts
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.shards import Rows, Shard, fill
from fbqat_hub.training.states import sampled_states
from fbqat_hub.training.teachers import resolve_teacher

SPLITS = ("train", "validation", "test")
# Counts the changes of what the files mean; a cache of another version is not looked at.
_VERSION = 2
# Encoded, or made by the sampler, at a time: one picture of 1024 x 1024, which takes half a gigabyte for each layer of
# 128 channels.
_PIXELS = 2**20
# Pictures of a shard that the sampler makes, of which each takes seconds: what an interruption costs at most.
_SAMPLED = 256
_OTHER_DATA = "{folder} was encoded from other data under the same name; delete it to encode it anew."


class CachedSplit:
    """One split: latents [N, C, H, W] and conditioning tensors [N, ...], indexable by sample.

    Args:
        captions: of the samples.
        prompts: the row of each caption among the embeddings.
    """

    def __init__(
        self, captions: list[str], prompts: Mapping[str, int], latents: list[Shard], embeddings: list[Shard]
    ) -> None:
        self.captions = captions
        self._prompts = prompts
        self._latents = [shard.tensors["latents"] for shard in latents if shard.tensors]
        self._embeddings = [Embeddings(shard.tensors) for shard in embeddings]
        self._starts = _starts([len(part) for part in self._latents]), [shard.first for shard in embeddings]

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditioning of the samples ``indices`` (int64 [B]); from half precision as float32."""
        samples = [int(index) for index in indices]
        places = [_place(self._starts[0], sample) for sample in samples]
        latents = torch.stack([self._latents[shard][row] for shard, row in places])
        return _full(latents), self._conditioning(samples)

    def _conditioning(self, samples: list[int]) -> dict[str, Tensor]:
        places = [_place(self._starts[1], self._prompts[self.captions[sample]]) for sample in samples]
        rows = [self._embeddings[shard].row(row) for shard, row in places]
        return {name: _full(torch.stack([row[name] for row in rows])) for name in rows[0]}

    def first(self, count: int) -> CachedSplit:
        """The first samples alone."""
        part = copy.copy(self)
        part.captions = self.captions[:count]
        return part


class SampledSplit(CachedSplit):
    """One split of prompts: what the teacher's own sampler asks of the denoiser, indexable by picture.

    A sample is a picture that the sampler makes, of which the noisy latents of some steps are kept, [K, C, H, W]. With
    guidance each of them is a state twice, with the prompt and without it.

    Args:
        captions, prompts, embeddings: as `CachedSplit`.
        pictures: shards of the rows "latents" and "timesteps".
        unprompted: conditioning of the sampler's second call, without a batch; None where it makes one.
    """

    def __init__(
        self,
        captions: list[str],
        prompts: Mapping[str, int],
        pictures: list[Shard],
        embeddings: list[Shard],
        unprompted: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__(captions, prompts, pictures, embeddings)
        self._timesteps = [shard.tensors["timesteps"] for shard in pictures]
        self._unprompted = unprompted

    def states(self, indices: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Noisy latents [B, C, H, W], timesteps [B] and conditioning of a state of each picture.

        Args:
            indices: int64 [B].
            uniform: [B] from 0 to 1, which chooses the state.
        """
        samples = [int(index) for index in indices]
        conditioning = self._conditioning(samples)
        calls = 1 if self._unprompted is None else 2
        chosen = (uniform * self._timesteps[0].shape[1] * calls).long()
        places = [(*_place(self._starts[0], n), int(step)) for n, step in zip(samples, chosen // calls, strict=True)]
        for name, value in (self._unprompted or {}).items():
            conditioning[name][chosen % calls == 1] = _full(value)
        latents = torch.stack([self._latents[shard][row, step] for shard, row, step in places])
        timesteps = torch.stack([self._timesteps[shard][row, step] for shard, row, step in places])
        return _full(latents), timesteps, conditioning


def _full(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _starts(sizes: list[int]) -> list[int]:
    """Where parts of these sizes begin when they lie one after the other.

    >>> _starts([3, 2, 4])
    [0, 3, 5]
    """
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _place(starts: list[int], item: int) -> tuple[int, int]:
    """(part, row in it) of an item.

    >>> _place([0, 3, 5], 4)
    (1, 1)
    """
    part = bisect.bisect_right(starts, item) - 1
    return part, item - starts[part]


def cached_splits(recipe: Recipe, pipeline: Any) -> dict[str, CachedSplit]:
    """Latents and conditioning of the recipe's data under its teacher, from disk or encoded now.

    Args:
        pipeline: the teacher, with its adapter merged.
    """
    family, folder = get_family(recipe.family), cache_folder(recipe)
    own = recipe.teacher_dtype
    if own != torch.float32 and not (folder / SPLITS[0]).exists() and (dtype := _dtype_of(pipeline)) != own:
        folder = cache_folder(recipe, dtype)  # a run is measured whose own data is gone
    if "prompts" in recipe.dataset:
        encoder = _Encoder(pipeline, family, recipe.size, recipe.generation, recipe.half)
        prompts, seeds = training_prompts(recipe.dataset), recipe.dataset.get("seeds", SEEDS)
        return {split: encoder.sampled(prompts[split], seeds, folder / split) for split in SPLITS}
    data = load_pictures(recipe.dataset, max(recipe.size))
    options = {"dtype": recipe.half, "skip": recipe.dataset.get("skip", SKIP)}
    return build_cache(pipeline, family, data, recipe.size, recipe.generation, folder, **options)


def _dtype_of(pipeline: Any) -> torch.dtype:
    found: torch.dtype = next(pipeline.vae.parameters()).dtype
    return found


def cache_folder(recipe: Recipe, encoded_in: torch.dtype | None = None) -> Path:
    """Where what the teacher makes of the recipe's data is kept.

    Args:
        encoded_in: the teacher's precision, if it is not the recipe's.
    """
    teacher, dataset = resolve_teacher(recipe.teacher), dict(recipe.dataset)
    if "prompts" in dataset:  # what the denoiser makes of them, its adapter too
        dataset["prompts"] = training_prompts(dataset)
        dataset["lora"] = adapter_key(recipe)
    precisions = recipe.half, encoded_in or recipe.teacher_dtype
    key = cache_key(teacher, dataset, recipe.size, recipe.generation, *precisions)
    return default_cache_dir() / "encoded" / f"{recipe.family}-{key}"


def adapter_key(recipe: Recipe) -> list[Any]:
    """What a key has of the adapter that is merged into the teacher: its files too, which one name can stand for."""
    return [recipe.lora, recipe.lora_scale, _files(recipe.lora)]


def build_cache(
    pipeline: Any,
    family: Family,
    data: datasets.DatasetDict,
    size: tuple[int, int],
    generation: Mapping[str, Any],
    root: Path,
    *,
    dtype: torch.dtype | None = None,
    skip: float = SKIP,
) -> dict[str, CachedSplit]:
    """Encode every split, or take it from ``root`` when the same pipeline and data were encoded before.

    Args:
        size: (height, width) of the training pictures; others are scaled, and cut at the middle.
        dtype: that latents and embeddings are kept in; None for that of the encoders.
        skip: the share of a split's pictures that may be left out.

    Raises:
        ValueError: more pictures than that cannot be used (the last one is named), or ``root`` is of other data.
    """
    encoder = _Encoder(pipeline, family, size, generation, dtype, skip)
    return {split: encoder.split(data[split], root / split) for split in SPLITS}


def cache_key(
    teacher: str,
    dataset: Mapping[str, Any],
    size: Any,
    generation: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    encoded_in: torch.dtype = torch.float32,
) -> str:
    """A short name for what a cache depends on; local files count by their names, sizes and times.

    Args:
        dtype: that is kept, as `build_cache`.
        encoded_in: the encoders' own.
    """
    data = {key: value for key, value in dataset.items() if key != "skip"}
    folders = [_files(teacher), *(_files(data.get(key)) for key in ("path", "data_dir"))]
    if "data_files" in data:
        folders.append(_data_files(data))
    given = [_VERSION, teacher, folders, data, size, dict(generation), str(dtype)]
    if encoded_in != torch.float32:
        given.append(str(encoded_in))
    return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _files(place: str | Path | None) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of a local folder, or of a local file; else nothing."""
    root = Path(place) if place else None
    if root is None or not root.exists():
        return []
    files = [(path, path.stat()) for path in (sorted(root.rglob("*")) if root.is_dir() else [root]) if path.is_file()]
    return [(str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns) for path, stat in files]


def _data_files(dataset: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Of what ``data_files`` names: a file, a pattern, or lists and mappings of such."""
    path = str(dataset.get("path", ""))
    base = Path(path if Path(path).is_dir() else "", dataset.get("data_dir") or "")
    patterns = [str(each).rpartition("::")[2] for each in tree_leaves(dataset["data_files"])]  # zip://*.jpg::a.zip
    found = [file for each in patterns for file in sorted(glob.glob(str(base / each), recursive=True))]
    return [(file, *stat[1:]) for file in found for stat in _files(file)]


@dataclass(frozen=True)
class _Encoder:
    """Of one pipeline; the fields are arguments of `build_cache`."""

    pipeline: Any
    family: Family
    size: tuple[int, int]
    generation: Mapping[str, Any]
    dtype: torch.dtype | None
    skip: float = SKIP

    def split(self, data: datasets.Dataset, folder: Path) -> CachedSplit:
        """From the folder, or made now."""
        captions = list(data["caption"])
        prompts = {caption: row for row, caption in enumerate(dict.fromkeys(filter(str.strip, captions)))}
        distinct, left_out = list(prompts), _LeftOut(folder.name, len(captions), self.skip)
        latents = fill(folder, "pictures", len(captions), lambda rows: self._pictures(data, rows, left_out))
        notes = [note for shard in latents for note in shard.notes]
        _LeftOut(folder.name, len(captions), self.skip).count(notes)
        embeddings = fill(folder, "captions", len(distinct), lambda rows: self._captions(distinct, rows))
        if len(notes) != len(captions) or [note for shard in embeddings for note in shard.notes] != distinct:
            raise ValueError(_OTHER_DATA.format(folder=folder))
        said = [note for note in notes if note]
        if said:
            with whole(folder / "left-out.txt") as partial:
                partial.write_text("\n".join(said) + "\n", encoding="utf-8")
            names = f"{len(said)} of {len(notes)} pictures of {folder.name} are left out"
            print(f"{names}; why is in {folder / 'left-out.txt'}", file=sys.stderr)
        used = [caption for caption, note in zip(captions, notes, strict=True) if not note]
        if not used:
            raise ValueError(f"no picture of the split {folder.name} can be used; the last: {said[-1]}")
        return CachedSplit(used, prompts, latents, embeddings)

    def sampled(self, prompts: list[str], seeds: int, folder: Path) -> SampledSplit:
        """Of prompts alone: from the folder, or made now by the sampler, ``seeds`` pictures of each."""
        pictures = [(prompt, number) for prompt in prompts for number in range(seeds)]
        states = fill(folder, "states", len(pictures), lambda rows: self._states(pictures, rows), most=_SAMPLED)
        embeddings = fill(folder, "captions", len(prompts), lambda rows: self._captions(prompts, rows))
        notes = [note for shard in states for note in shard.notes]
        if [note["prompt"] for note in notes] != [prompt for prompt, _ in pictures]:
            raise ValueError(_OTHER_DATA.format(folder=folder))
        unprompted = None
        if notes[0]["guided"]:
            (shard,) = fill(folder, "no-prompt", 1, lambda _: self._no_prompt())
            unprompted = Embeddings(shard.tensors).row(0)
        rows = {prompt: row for row, prompt in enumerate(prompts)}
        return SampledSplit([prompt for prompt, _ in pictures], rows, states, embeddings, unprompted)

    def _states(self, pictures: list[tuple[str, int]], rows: range) -> Rows:
        batch, parts, notes = pictures[rows.start : rows.stop], [], []
        for first in range(0, len(batch), self._at_once):
            part = batch[first : first + self._at_once]
            tensors, guided = sampled_states(self.pipeline, self.family, part, self.size, self.generation)
            parts.append(tensors)
            notes += [{"prompt": prompt, "guided": guided} for prompt, _ in part]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Rows({**found, "latents": found["latents"].to(self.dtype or found["latents"].dtype)}, notes)

    @torch.no_grad()
    def _no_prompt(self) -> Rows:
        return Rows(without_padding(self.family.encode_no_prompt(self.pipeline, self.generation), self.dtype))

    @property
    def _at_once(self) -> int:
        """Pictures that are encoded or made at a time."""
        return max(1, _PIXELS // (self.size[0] * self.size[1]))

    @torch.no_grad()
    def _pictures(self, data: datasets.Dataset, rows: range, left_out: _LeftOut) -> Rows:
        """Latents of the rows whose picture can be used; a note each: why it cannot, or nothing."""
        found, images, notes = data[rows.start : rows.stop], [], []
        for row, stored, caption in zip(rows, found["image"], found["caption"], strict=True):
            where = f"training data, {left_out.split}, row {row + 1}"
            try:
                if not caption.strip():
                    raise ValueError(f"{name_of(stored, where)} has no caption.")
                images.append(training_picture(stored, self.size[::-1], where))
                notes.append("")
            except (ValueError, FileNotFoundError) as error:
                notes.append(str(error))
        left_out.count(notes)
        if not images:
            return Rows({}, notes)
        parts = [
            self.family.encode_images(self.pipeline, part.float() / 127.5 - 1)
            for part in pixels(images).split(self._at_once)
        ]
        latents = torch.cat(parts)
        return Rows({"latents": latents.to(self.dtype or latents.dtype)}, notes)

    @torch.no_grad()
    def _captions(self, captions: list[str], rows: range) -> Rows:
        batch = captions[rows.start : rows.stop]
        conditioning = self.family.encode_prompts(self.pipeline, batch, self.generation)
        return Rows(without_padding(conditioning, self.dtype), batch)


@dataclass
class _LeftOut:
    """How many pictures of a split are left out; too many are an error."""

    split: str
    total: int
    share: float
    number: int = 0

    def count(self, notes: list[str]) -> None:
        """
        >>> _LeftOut("train", 9, 0.1).count(["", "a.png is damaged."])
        Traceback (most recent call last):
        ValueError: a.png is damaged. 1 of the 9 pictures of train cannot be used; dataset.skip is 0.1: take them out, \
or raise it.
        """
        said = [note for note in notes if note]
        self.number += len(said)
        if self.number > self.share * self.total:
            raise ValueError(
                f"{said[-1]} {self.number} of the {self.total} pictures of {self.split} cannot be used; dataset.skip "
                f"is {self.share:g}: take them out, or raise it."
            )
