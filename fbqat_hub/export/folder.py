"""The folder an export leaves: whole, or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fbqat_hub.export.errors import ExportError
from fbqat_hub.files import usual_modes
from fbqat_hub.inputs import output_folder


def check_new(output_dir: str | os.PathLike[str]) -> Path:
    """The path, without links, of a folder that is empty or can be made; ExportError of any other."""
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"the output folder {output} exists and is not empty; remove it or name another")
    try:
        return output_folder(output).resolve()
    except OSError as error:
        raise ExportError(str(error)) from None


@contextmanager
def staging(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to build in, which gets the name `output_dir` when the block ends without an error.

    Where `output_dir` is there, what was built moves into it: it may be where a disk is mounted, or the current folder.
    Where a step fails after something was written, that is kept in `<output_dir>.unfinished`, and the error says so.

    Raises:
        ExportError: `output_dir` has content, or cannot be written.
    """
    output = check_new(output_dir)
    unfinished = output.with_name(f"{output.name}.unfinished")
    folder, inside = None, output.is_dir()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output if inside else output.parent))
        yield folder
        folder.chmod(0o755)  # mkdtemp's folders are private
        usual_modes(folder)
        if inside:
            for path in folder.iterdir():
                path.rename(output / path.name)
        else:
            folder.rename(output)
        shutil.rmtree(unfinished, ignore_errors=True)
    except ValueError as error:
        if folder is None or not any(folder.iterdir()):
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.move(folder, unfinished)
        raise ExportError(
            f"{error}. What was made so far is in {unfinished}; cure it and repeat the command"
        ) from error
    except OSError as error:
        raise ExportError(f"could not write the export to {output}: {error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
