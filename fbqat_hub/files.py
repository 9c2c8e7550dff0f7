"""Files and folders that are whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write beside, then rename: neither a reader nor an interruption meets half of what has the name.

    Yields:
        A path beside ``path`` for a file, or a folder to make. It replaces ``path`` when the block ends, and is removed
        when the block fails.

    Raises:
        OSError: ``path`` is a folder with something in it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with whole(folder / "settings.json") as partial:
    ...     _ = partial.write_text("{}")
    >>> [file.name for file in folder.iterdir()]
    ['settings.json']
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        usual_modes(partial)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def usual_modes(made: Path) -> None:
    """Let others read safetensors, a file or those of a folder, as far as the umask lets them read any new file.

    safetensors 0.8 makes files that their owner alone reads; a model may be served by another user.
    """
    os.umask(umask := os.umask(0o077))
    for file in made.rglob("*") if made.is_dir() else [made]:
        if ".safetensors" in file.name and file.is_file():
            with suppress(OSError):  # of a file system without modes
                file.chmod(0o666 & ~umask)


def shipped(name: str) -> Path:
    """A file or folder that ships with the package and that people edit: of a checkout, or of an installation.

    Args:
        name: its path in the checkout, e.g. "training/recipes" or "model_cards/template.md".

    Raises:
        FileNotFoundError: neither place has it: the installation is damaged.
    """
    package = Path(__file__).parent
    for place in (package.parent, package / "shipped"):
        if (place / name).exists() and (place is not package.parent or (place / "pyproject.toml").is_file()):
            return place / name
    raise FileNotFoundError(
        f"{name} is missing from fbqat_hub; install it again: pip install --force-reinstall fbqat-hub"
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of every file in ``folder`` and below, by its path with ``/``."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
