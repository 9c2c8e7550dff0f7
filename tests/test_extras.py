"""The table of extras is that of pyproject.toml, and a missing library is said with what installs it."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fbqat_hub.extras import EXTRAS, missing

ROOT = Path(__file__).parents[1]


def test_every_extra_of_the_project_is_in_the_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(project) - {"all", "dev"}
    brought: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            brought.setdefault(distribution.lower().replace("_", "-"), set()).add(module)
    for extra, modules in EXTRAS.items():
        for requirement in map(Requirement, project[extra]):
            installed = brought.get(requirement.name)
            assert installed is None or installed & set(modules), f"{requirement.name} of {extra}"


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_library_is_said_with_its_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = EXTRAS[extra][0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as raised:
        __import__(module)
    said = str(missing(raised.value, "fbqat x"))
    assert said == f"fbqat x needs {module}, which is not installed: pip install 'fbqat-hub[{extra}]'"


def test_a_library_that_is_broken_says_why_and_one_of_no_extra_speaks_for_itself() -> None:
    broken = ImportError("cannot import\n name x", name="piq")
    assert "needs piq, which cannot be imported (cannot import name x): pip install" in str(missing(broken, "CLIP-IQA"))
    within = ModuleNotFoundError("No module named 'datasets.old'", name="datasets.old")
    assert "needs datasets, which cannot be imported (No module named 'datasets.old')" in str(missing(within))
    other = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    assert missing(other) is other
