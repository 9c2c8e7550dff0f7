"""`optimum-cli export qnn`: registered through the namespace package, errors of one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NAMESPACE = ROOT / "integrations" / "optimum"


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command line in the environment of the tests, where this package is installed."""
    code = "from optimum.commands.optimum_cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_export_qnn_is_a_command() -> None:
    pytest.importorskip("optimum")
    done = optimum_cli("export", "qnn", "--help")
    assert done.returncode == 0, done.stderr
    assert "--soc" in done.stdout
    assert "--precision" in done.stdout


def test_an_error_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("optimum")
    done = optimum_cli("export", "qnn", "--model", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "calibration needs at least two prompts, of which the last is held out: --prompts FILE, one a line"
    )
    assert "Traceback" not in done.stderr


def test_the_namespace_has_no_init_file() -> None:
    """One of them would hide optimum itself."""
    assert not list(NAMESPACE.rglob("__init__.py"))
    assert [path.relative_to(NAMESPACE).as_posix() for path in NAMESPACE.rglob("*.py")] == [
        "optimum/commands/register/register_fbqat.py"
    ]
