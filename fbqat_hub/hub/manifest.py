"""The manifest of a published model, ``fbqat.json``: every file's size and SHA-256, what it is and how it was made.

A downloader can leave files out in silence (``snapshot_download`` may return an older, partial snapshot on HTTP 429 or
503), so a folder counts as whole only where this list says so. One JSON object::

    {"manifest_version": 1, "name": "Sana-600M-FBQAT-W4A8", "family": "sana", "method": "fbqat", "weight_bits": 4,
     "activation_bits": 8, "base_model": "owner/model", "license": "apache-2.0", "recipe": {...}, "versions": {...},
     "provenance": {"commands": ["fbqat evaluate runs/sana"], "date": "2026-11-23T01:00:00+00:00"},
     "files": {"transformer/config.json": {"size": 1055, "sha256": "..."}}}

The manifest does not list itself. It holds nothing of the moment of writing, so the same files give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any, BinaryIO, Literal

from fbqat_hub.version import __version__

MANIFEST = "fbqat.json"
MANIFEST_VERSION = 1
Use = Literal["diffusers", "htp"]
CARD = "README.md"  # edited on the Hub by hand; a card that differs is told, not refused

_MAX_BYTES = 16 * 2**20  # 100,000 files x ~160 bytes each
_MAX_FILES = 100_000
_MAX_SIZE = 2**50
_CHUNK = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# what an Android program needs beside htp/: to make the graph's inputs and to step the noise
_HTP_FOLDERS = re.compile(r"htp|tokenizer(_\d+)?|scheduler")


@dataclass(frozen=True)
class FileEntry:
    """One file: ``size`` in bytes and the SHA-256 of its content, 64 lower-case hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``fbqat.json`` says.

    Attributes:
        name: of the model.
        family, method: as in its recipe.
        weight_bits, activation_bits: stored.
        base_model: what it was made of, Hub id or name.
        license: the base model's, as the Hub writes it.
        recipe: all fields of recipe.yaml, without local paths.
        versions: package -> version, of those that measured it; of ``fbqat_hub`` alone where nothing was measured.
        provenance: ``commands`` that measured it and the ``date`` (ISO 8601, UTC) of the last of them.
        files: path, with ``/`` -> size and hash. Every file but the manifest.
    """

    name: str
    family: str
    method: str
    weight_bits: int
    activation_bits: int
    base_model: str
    license: str
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    def to_bytes(self) -> bytes:
        """The file's content, UTF-8; the same for the same manifest."""
        plain = {
            "manifest_version": MANIFEST_VERSION,
            **asdict(self),
            "files": dict(sorted(asdict(self)["files"].items())),
        }
        return (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    def files_for(self, use: Use | None) -> list[str]:
        """The sorted paths that a use needs; all of them for None.

        "diffusers": all but ``htp/`` and ``images/``. "htp": ``htp/``, tokenizers, scheduler. Both: the top's files.
        """
        return sorted(path for path in self.files if use is None or serves(path, use))


def serves(path: str, use: Use) -> bool:
    """Whether a use needs a file, see `Manifest.files_for`."""
    folder, slash, _ = path.partition("/")
    return not slash or (
        folder not in ("htp", "images") if use == "diffusers" else bool(_HTP_FOLDERS.fullmatch(folder))
    )


def hash_file(file: BinaryIO, progress: Callable[[int], object] = lambda _: None) -> FileEntry:
    """Size and SHA-256 of a file that is open for reading; ``progress`` is told the bytes of each chunk."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        progress(len(chunk))
    return FileEntry(size, digest.hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a downloaded model.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is not a manifest of version 1, or too large, too deep or unsafe to be followed; names what.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}, so what belongs into it is not known. Models published with `fbqat publish` "
            "have one; of others `hf cache verify` compares the files with the Hub's."
        )
    with path.open("rb") as file:
        return parse_manifest(file.read(_MAX_BYTES + 1), str(path))


def parse_manifest(content: bytes, where: str = MANIFEST) -> Manifest:
    """The manifest in a file's content; ``where`` is named in errors.

    Nothing in it is trusted: its length, depth, keys, types, paths (relative, of plain names, none inside another
    file, none the same but for case), sizes and hashes are checked.

    Raises:
        ValueError: names what is wrong.
    """
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{where} is larger than {_MAX_BYTES >> 20} MiB; that is no manifest.")
    try:
        data = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; that is no manifest.") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON as a manifest needs it ({error}); download it again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} holds a JSON {type(data).__name__}; an object is needed: download it again.")
    version = data.pop("manifest_version", None)
    if type(version) is not int or version < 1:
        raise ValueError(f"{where}: manifest_version is {version!r:.40}; it must be a whole number from 1.")
    if version > MANIFEST_VERSION:
        raise ValueError(
            f"{where} has manifest_version {version}; this is fbqat_hub {__version__}, which reads up to "
            f"{MANIFEST_VERSION}. Update with: pip install -U fbqat-hub"
        )
    kinds: dict[str, type] = dict.fromkeys(("recipe", "versions", "provenance", "files"), dict)
    kinds |= dict.fromkeys(("weight_bits", "activation_bits"), int)
    names = [field.name for field in fields(Manifest)]
    wrong = [name for name in names if type(data.get(name)) is not kinds.get(name, str)]
    wrong += sorted(set(data) - set(names))
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)[:200]} missing, of the wrong type, or not known in version 1.")
    entries = {path: _entry(path, entry, where) for path, entry in data.pop("files").items()}
    _check_together(list(entries), where)
    return Manifest(**data, files=entries)


def check_path(path: str, where: str = MANIFEST) -> None:
    """Refuse a path that is not plain, relative and inside the folder.

    Raises:
        ValueError: an empty or absolute path, ``.`` or ``..`` as a part, a backslash, a colon (a drive, a stream), a
            control character, or the manifest itself.
    """
    parts = path.split("/")
    bad = not all(parts) or {".", ".."} & set(parts) or re.search(r'[\x00-\x1f\x7f\\:*?"<>|]', path) or path == MANIFEST
    if bad or len(path) > 1024 or any(part != part.strip() or len(part.encode()) > 255 for part in parts):
        raise ValueError(f"{where}: {path!r:.80} is no path of a file inside the folder; the list cannot be followed.")


def _entry(path: str, entry: Any, where: str) -> FileEntry:
    check_path(path, where)
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        raise ValueError(f"{where}: the entry of {path} must have size and sha256, and nothing else.")
    size, digest = entry["size"], entry["sha256"]
    if type(size) is not int or not 0 <= size <= _MAX_SIZE:
        raise ValueError(f"{where}: size of {path} is {size!r:.40}; it must be a whole number from 0 to 2^50.")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"{where}: sha256 of {path} is {digest!r:.80}; it must be 64 hexadecimal digits.")
    return FileEntry(size, digest)


def _check_together(paths: list[str], where: str) -> None:
    if not 0 < len(paths) <= _MAX_FILES:
        raise ValueError(f"{where} lists {len(paths)} files; it must be from 1 to {_MAX_FILES}.")
    folded = {path.casefold() for path in paths}
    if len(folded) < len(paths):
        raise ValueError(f"{where} lists files whose names differ in case only; not every disk can hold them.")
    for path in folded:
        if inside := [str(parent) for parent in PurePosixPath(path).parents if str(parent) in folded]:
            raise ValueError(f"{where} lists {inside[0]} as a file and as a folder.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


@dataclass(frozen=True)
class Check:
    """What comparing a folder with its manifest found; all empty for a whole one.

    Attributes:
        missing: paths that are not there.
        damaged: (path, how it differs).
        edited: True if the card is not the published one.
    """

    missing: list[str]
    damaged: list[tuple[str, str]]
    edited: bool

    @property
    def bad(self) -> list[str]:
        """Paths that must be fetched again."""
        return self.missing + [path for path, _ in self.damaged]

    def __str__(self) -> str:
        lines = [f"{path}: missing" for path in self.missing] + [f"{path}: {how}" for path, how in self.damaged]
        return "; ".join(lines[:10]) + (f"; and {len(lines) - 10} more" if len(lines) > 10 else "")


def check_files(
    folder: Path, manifest: Manifest, paths: Iterable[str], progress: Callable[[int], object] = lambda _: None
) -> Check:
    """Compare files on disk with the manifest: sizes first, then SHA-256.

    Args:
        paths: those of the manifest to compare.
        progress: is told the bytes of each file that is done with.
    """
    missing, damaged, edited = [], [], False
    for path in paths:
        file, entry = folder / path, manifest.files[path]
        if not file.is_file():
            missing.append(path)
        elif how := _difference(file, entry):
            edited = edited or path == CARD
            damaged += [(path, how)] if path != CARD else []
        progress(entry.size)
    return Check(missing, damaged, edited)


def _difference(file: Path, entry: FileEntry) -> str:
    """How a file differs from its entry; empty if it does not."""
    size = file.stat().st_size
    if size != entry.size:
        return f"has {size} bytes, published with {entry.size}"
    with file.open("rb") as opened:
        digest = hash_file(opened).sha256
    return "" if digest == entry.sha256 else f"has SHA-256 {digest[:12]}…, published with {entry.sha256[:12]}…"


def check_component(component: Path) -> None:
    """Refuse a component's folder in which a file is missing or cut short, by the manifest beside it if there is one.

    Sizes only: what is read every time a model loads must be quick.

    Raises:
        ValueError: names the files, or what is wrong with the manifest.
    """
    if not (component.parent / MANIFEST).is_file():
        return
    manifest = read_manifest(component.parent)
    problems = []
    for path, entry in manifest.files.items():
        if path.startswith(f"{component.name}/"):
            file = component.parent / path
            size = file.stat().st_size if file.is_file() else None
            if size != entry.size:
                problems.append(f"{path} " + ("is missing" if size is None else f"has {size} bytes of {entry.size}"))
    if problems:
        raise ValueError(
            f"{component.parent} is not as it was published: {'; '.join(problems[:5])}. Fetch it again with "
            f"`fbqat pull REPO --output {quote(str(component.parent))}`; if the files were changed on purpose, delete "
            f"{MANIFEST}."
        )
