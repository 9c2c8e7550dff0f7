"""An error in one line: ours as it is, that of a library after its name; a fault of ours is told from both."""

from __future__ import annotations

import errno
import sys

from safetensors import SafetensorError

from fbqat_hub.extras import missing

ISSUES = "https://github.com/fbqat-hub/fbqat_hub/issues"
FAULT = (
    "this is a fault in fbqat_hub, not in what you typed. Please report it with the lines above, the command and the "
    f"output of `pip list`: {ISSUES}"
)
_EXPECTED = (OSError, ValueError, ImportError, FloatingPointError, SafetensorError)


class UsageError(Exception):
    """A command that cannot be read; the text is the whole line to print."""


def line_of(error: Exception, verb: str) -> str | None:
    """What a user is told of an error; None if it is a fault of ours.

    Args:
        verb: the command that was running.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"{verb} ran out of memory ({text.rstrip('.')[:200]}). Close other programs, or ask for less: smaller "
            "pictures or batches, fewer at once, --device cpu."
        )
    # safetensors passes the system's number on in its text only
    if getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in text:
        return f"{text} Free some space, then repeat the command (training: with --resume)."
    if not isinstance(error, _EXPECTED) and not _of(error, "fbqat_hub", RuntimeError) and not _of(error, "httpx"):
        return None
    if isinstance(error, ImportError):
        return str(missing(error, f"fbqat {verb}"))
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    library = _raised_in(error)
    return text if library is None else f"{verb} stopped in {library}: {text}"


def _of(error: Exception, package: str, kind: type[Exception] = Exception) -> bool:
    """Whether its class is one of a package's."""
    return isinstance(error, kind) and type(error).__module__.partition(".")[0] == package


def _raised_in(error: Exception) -> str | None:
    """The installed library that raised it; None for this package and Python's own."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return None
    package = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    known = package in ("fbqat_hub", "__main__") or package in sys.stdlib_module_names
    return None if known else package
