"""Tables in the documents say what the tracked results say, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fbqat_hub.cli.errors import UsageError
from fbqat_hub.cli.parser import parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("generator", ["benchmarks.tables", "benchmarks.method.report"])
def test_tables_are_those_of_the_results(generator: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", generator, "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def _commands(document: Path) -> list[str]:
    """The `fbqat` command lines in the shell blocks of a document."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        part.strip() for line in lines for part in line.partition(" #")[0].split("&&") if part.strip()[:6] == "fbqat "
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_command_lines_parse(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where what they name is not there
    for command in _commands(document):
        try:
            parser().parse_args(shlex.split(command)[1:])
        except UsageError as error:
            pytest.fail(f"{command}\n{error}")


def test_the_page_of_real_models_has_commands() -> None:
    verbs = {command.split()[1] for command in _commands(ROOT / "docs" / "real-models.md")}
    assert verbs >= {"plan", "convert", "train", "evaluate", "card", "publish", "pull", "generate"}
