from __future__ import annotations

from pathlib import Path

import pytest

from fbqat_hub.training.ptq import convert_pipeline


@pytest.fixture(scope="session")
def packed_folder(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed pipeline of the tiny Sana. Not to be written to."""
    return convert_pipeline(str(tiny_sana), tmp_path_factory.mktemp("packed") / "sana")
