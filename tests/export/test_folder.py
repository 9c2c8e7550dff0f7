"""The folder of an export: what is there already stays what it is, and what cannot be written to is said first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fbqat_hub import export_run
from fbqat_hub.cli import main
from fbqat_hub.export import ExportError
from fbqat_hub.export.folder import check_new, staging


@pytest.mark.parametrize("kind", ["new", "there", "link", "link to nothing", "current folder"])
def test_the_export_gets_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was there is still the same one: a disk may be mounted there, or a shell be in it."""
    real, output = tmp_path / "real", tmp_path / "out"
    if kind in ("there", "link", "current folder"):
        real.mkdir()
    if kind.startswith("link"):
        output.symlink_to(real)
    elif kind == "current folder":
        monkeypatch.chdir(real)
        output = Path()
    else:
        output = real
    before = real.stat().st_ino if real.exists() else None
    with staging(output) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text("made")
        (folder / "other").write_text("made")
    assert (real / "inside" / "file").read_text() == "made"
    assert {path.name for path in real.iterdir()} == {"inside", "other"}
    assert before in (None, real.stat().st_ino)
    assert {path.name for path in tmp_path.iterdir()} <= {"real", "out"}


def test_what_failed_is_kept_beside_a_folder_that_was_there(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()

    def fail() -> None:
        with staging(output) as folder:
            (folder / "file").write_text("half")
            raise ValueError("why")

    with pytest.raises(ExportError, match=r"why\. What was made so far is in .*out\.unfinished"):
        fail()
    assert not list(output.iterdir())
    assert (tmp_path / "out.unfinished" / "file").read_text() == "half"


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot be made, since .*file is a file"):
        check_new(tmp_path / "file" / "out")


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The way this process takes SIGTERM, afterwards as before; the tests do not end by it."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM would end the process at once"))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
def test_an_export_that_is_told_to_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM, as a scheduler or a container ends it."""

    def export(_run: Any, output: Path, **_: Any) -> None:
        with staging(output) as folder:
            (folder / "file").write_text("half")
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(export_run, "export_run", export)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), "--output", str(tmp_path / "out")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
