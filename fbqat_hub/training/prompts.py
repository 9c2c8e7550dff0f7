"""Prompts of an evaluation or of a training: OpenMoji offline, MJHQ-30K, PixArt-Sigma's and YE-POP from the Hub.

Each of the sets on the Hub is one JSON table of prompts and one zip of pictures; the zip is downloaded only where the
pictures are asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import torch

from fbqat_hub.inputs import read_prompts
from fbqat_hub.training.openmoji import load_openmoji
from fbqat_hub.training.seeding import generator
from fbqat_hub.untrusted import read_json


@dataclass(frozen=True)
class HubPrompts:
    """A prompt set on the Hub.

    Attributes:
        repo: id of the data set.
        table: JSON file: a list of rows, or a mapping of names to rows.
        text: field of a row with the prompt.
        archive: zip of the pictures.
        picture: field of a row with its picture's file name; None where the row's name in the mapping is that.
        rows: about how many there are.
        download: what the two files weigh.
    """

    repo: str
    table: str
    text: str
    archive: str
    picture: str | None
    rows: int
    download: str


PROMPT_SETS: dict[str, HubPrompts | None] = {
    "openmoji": None,  # of this package, without a download
    "mjhq-30k": HubPrompts(
        "playgroundai/MJHQ-30K", "meta_data.json", "prompt", "mjhq30k_imgs.zip", None, 30_000, "9 MB, pictures 3.6 GB"
    ),
    "pixart-eval-30k": HubPrompts(
        "PixArt-alpha/PixArt-Eval30K",
        "PixArt-Eval30K.json",
        "prompt",
        "pixart-eval30K.zip",
        "path",
        30_000,
        "18 MB, pictures 48.5 GB",
    ),
    # the first of ten parts
    "ye-pop": HubPrompts(
        "Ejafa/ye-pop",
        "images/chunk_1/chunk_1.0.json",
        "cogvlm_caption",
        "images/chunk_1/chunk_1.zip",
        "filename",
        48_000,
        "87 MB, pictures 11.5 GB",
    ),
}


_LARGEST_PICTURE = 2**28  # bytes, as unpacked
_LARGEST_TABLE = 2**28
# Of prompts to train on, in each of the splits that are held out.
_HELD_OUT = 0.025


def load_prompts(name: str, count: int | None = None, *, seed: int = 0, images: bool = False) -> datasets.Dataset:
    """Prompts of a set, in an order that the seed gives.

    Args:
        name: of `PROMPT_SETS`.
        count: at most so many; all if None. A smaller count gives the first ones of a greater one.
        seed: of the order.
        images: also the real pictures.

    Returns:
        Columns ``prompt`` and, where asked for, ``image`` (as stored; `training.pictures.picture_of` reads it).

    Raises:
        ImportError: for openmoji, its package is missing.
        ValueError: an unknown name, a count below 1, or a table or archive that is not as expected.
        OSError: the Hub cannot be reached, and the files were not downloaded before.
    """
    if name not in PROMPT_SETS:
        near = difflib.get_close_matches(name, PROMPT_SETS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown prompts {name!r}.{hint} Known: {', '.join(PROMPT_SETS)}, or a text file.")
    if count is not None and count < 1:
        raise ValueError(f"{count} prompts of {name} were asked for; ask for at least 1.")
    source = PROMPT_SETS[name]
    if source is None:
        rows = load_openmoji()["test"].rename_column("caption", "prompt")
        return rows.select(_order(len(rows), seed, count)).select_columns(["prompt", "image"] if images else ["prompt"])
    table = _rows(source, name)
    chosen = [table[index] for index in _order(len(table), seed, count)]
    if not images:
        return datasets.Dataset.from_dict({"prompt": [prompt for prompt, _ in chosen]})
    return datasets.Dataset.from_generator(
        _with_pictures,
        features=datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image(decode=False)}),
        gen_kwargs={"archive": str(_file(source, name, source.archive)), "rows": [chosen]},
    )


def training_prompts(dataset: Mapping[str, Any]) -> dict[str, list[str]]:
    """Split -> the prompts of a recipe that trains on prompts alone; each once, no split has another's.

    Of a file, or of a set on the Hub, the validation and test splits have 2.5% each, at least one prompt, by a hash of
    the text: where a prompt stands does not matter. OpenMoji's splits are its own.

    Args:
        dataset: {"prompts": a text file with a prompt on each line, or a key of `PROMPT_SETS`}, perhaps with "count"
            of the latter, or "groups" of OpenMoji.

    Raises:
        OSError, ValueError: as `read_prompts` and `load_prompts`, fewer than three different prompts, or a split that
            none are left for.
    """
    name = str(dataset["prompts"])
    if name == "openmoji":
        splits = {
            split: list(rows["caption"]) for split, rows in load_openmoji(groups=dataset.get("groups", ())).items()
        }
    else:
        named = name in PROMPT_SETS
        found = list(load_prompts(name, dataset.get("count"))["prompt"]) if named else read_prompts(Path(name))
        by_hash = sorted(set(found), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        if len(by_hash) < 3:
            raise ValueError(
                f"recipe: dataset.prompts, {name}, has {len(by_hash)} different prompts; give at least 3, to train, to "
                "validate and to test on."
            )
        held = max(1, round(_HELD_OUT * len(by_hash)))
        splits = {"test": by_hash[:held], "validation": by_hash[held : 2 * held], "train": found}
    taken: set[str] = set()
    for split in ("test", "validation", "train"):
        splits[split] = [prompt for prompt in dict.fromkeys(splits[split]) if prompt not in taken]
        taken |= set(splits[split])
        if not splits[split]:
            raise ValueError(f"recipe: dataset.prompts, {name}, leaves no prompt for the split {split}; give more.")
    return splits


def _rows(source: HubPrompts, name: str) -> list[tuple[str, str]]:
    """(prompt, stem of the picture's file name) of every row that has a prompt, in the order of the stems."""
    table = read_json(_file(source, name, source.table), _LARGEST_TABLE)
    named: list[tuple[str, Mapping[str, Any]]] = (
        list(table.items()) if isinstance(table, dict) else [("", row) for row in table]
    )
    fields = {source.text} | ({source.picture} if source.picture else set())
    found = {}
    for key, row in named:
        if not isinstance(row, dict):
            raise ValueError(f"{source.repo}: a row of {source.table} is {row!r:.80}; the data set has changed.")
        if missing := fields - row.keys():
            raise ValueError(
                f"{source.repo}: a row of {source.table} has {', '.join(sorted(row))}, but not "
                f"{', '.join(sorted(missing))}; the data set has changed since this was written."
            )
        if row[source.text] and str(row[source.text]).strip():
            file = str(row[source.picture]) if source.picture else key
            found[PurePosixPath(file).stem if source.picture else file] = str(row[source.text]).strip()
    return [(found[stem], stem) for stem in sorted(found)]


def _with_pictures(archive: str, rows: list[list[tuple[str, str]]]) -> Iterator[dict[str, Any]]:
    """``rows`` is wrapped in a list, of which `datasets` makes a shard."""
    with _opened(Path(archive)) as pictures:
        members = {PurePosixPath(name).stem: name for name in pictures.namelist() if not name.endswith("/")}
        for part in rows:
            for prompt, stem in part:
                if stem not in members:
                    raise ValueError(f"{Path(archive).name} has no picture {stem!r}; delete it and download it again.")
                if (size := pictures.getinfo(members[stem]).file_size) > _LARGEST_PICTURE:
                    raise ValueError(
                        f"{Path(archive).name}: {members[stem]} unpacks to {size} bytes; it is no picture."
                    )
                yield {"prompt": prompt, "image": {"path": None, "bytes": pictures.read(members[stem])}}


def _opened(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive.name} is damaged ({error}); delete it and download it again.") from None


def _file(source: HubPrompts, name: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repo, path, repo_type="dataset"))
    except OSError as error:
        raise OSError(
            f"the prompts {name} are on the Hub ({source.repo}: {source.download}), and {path} cannot be had "
            f"({type(error).__name__}). Go online for it once, or use --prompts openmoji, which needs no download."
        ) from error


def _order(size: int, seed: int, count: int | None) -> list[int]:
    return torch.randperm(size, generator=generator("prompts", seed))[:count].tolist()
