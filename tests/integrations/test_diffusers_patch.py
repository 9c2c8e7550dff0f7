"""The change of diffusers that loads packed models without our import: it fits the tested version, and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from tests.conftest import ROOT, subprocess_environment
from tests.integrations.tiny import packed_as

PATCH = ROOT / "integrations" / "diffusers" / "fbqat.patch"
INSTALLED = Path(diffusers.__file__).parent
LOAD = """
import sys
{before}
from diffusers import DiffusionPipeline
assert "fbqat_hub" not in sys.modules or sys.modules["fbqat_hub"] is None
pipeline = DiffusionPipeline.from_pretrained({folder!r})
layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
print(type(layer).__name__, pipeline.transformer.hf_quantizer.__module__)
"""


def _apply(tree: Path) -> None:
    """Its changes of ``src/``, to a copy of the installed package at ``tree/src/diffusers``."""
    command = ["git", "apply", "--include=src/*", str(PATCH)]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_patch_fits_the_tested_version(tmp_path: Path) -> None:
    changed = re.findall(r"^\+\+\+ b/(src/diffusers/\S+)", PATCH.read_text(), re.MULTILINE)
    for name in changed:
        source, target = INSTALLED.parent / name.removeprefix("src/"), tmp_path / name
        if source.exists():  # the others are new
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    _apply(tmp_path)
    assert '"fbqat": FBQATQuantizer' in (tmp_path / "src/diffusers/quantizers/auto.py").read_text()
    for name in changed:
        compile((tmp_path / name).read_text(), name, "exec")


@pytest.mark.slow
def test_patched_diffusers_loads_a_packed_pipeline_without_our_import(tiny_sana: Path, tmp_path: Path) -> None:
    shutil.copytree(INSTALLED, tmp_path / "src" / "diffusers")
    _apply(tmp_path)
    folder = str(packed_as(tiny_sana, tmp_path / "packed"))
    found = {}
    for case, before in {"with": "", "without": "sys.modules['fbqat_hub'] = None"}.items():
        found[case] = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", LOAD.format(before=before, folder=folder)],
            env=subprocess_environment(PYTHONPATH=os.pathsep.join([str(tmp_path / "src"), str(ROOT)])),
            capture_output=True,
            text=True,
        )
    assert found["with"].stdout.strip() == "PackedLinear fbqat_hub.integrations.diffusers", found["with"].stderr
    assert found["without"].returncode
    assert "requires the fbqat-hub library: `pip install fbqat-hub`" in found["without"].stderr
