"""The folder in which this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """``$FBQAT_CACHE``, else ``~/.cache/fbqat_hub``; it may not exist yet."""
    return Path(os.environ.get("FBQAT_CACHE", Path.home() / ".cache" / "fbqat_hub"))
