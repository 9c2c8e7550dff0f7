"""The table of extras is that of pyproject.toml, and a missing library is said with what installs it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fbqat_hub.extras import EXTRAS, missing

ROOT = Path(__file__).parents[1]
# As if no extra were installed.
WITHOUT = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, *rest)
sys.meta_path = [Finder if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
"""


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


def test_what_is_for_a_plain_install_needs_no_extra() -> None:
    """README: ``pip install fbqat-hub`` is to load, generate and convert."""
    assert "pip install fbqat-hub                     # load, generate, convert\n" in (ROOT / "README.md").read_text()
    hidden = {module for modules in EXTRAS.values() for module in modules} - {"tokenizers"}  # transformers' own too
    modules = "fbqat_hub.training.ptq, fbqat_hub.training.sampled, fbqat_hub.training.generate"
    code = f"{WITHOUT.format(hidden=hidden)}\nimport diffusers, {modules}\nassert 'datasets' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
