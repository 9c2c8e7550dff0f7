"""The house holds: what is built is what is tracked, importing is quiet, pins and the README's map are true."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fbqat_hub"
# of the checkout -> where the wheel has it
SHIPPED = {
    **{n: f"{PACKAGE}/shipped/{n}" for n in ("training/recipes", "training/teachers", "model_cards/")},
    "benchmarks/results/training.json": f"{PACKAGE}/shipped/benchmarks/results/training.json",
    "integrations/optimum/optimum": f"{PACKAGE}/shipped/integrations/optimum/optimum",
    "integrations/optimum/fbqat_hub_optimum.pth": "fbqat_hub_optimum.pth",
}


def _git_files(*folders: str) -> list[Path]:
    """Files of these folders that git tracks or would track, those deleted since left out."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [Path(name) for name in names if name and (ROOT / name).is_file()]


def _stays(path: Path) -> bool:
    """Of model_cards only the template and the data files ship."""
    return path.parts[0] == "model_cards" and (len(path.parts) > 2 or path.suffix == ".py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as a package index gets it: sdist from the checkout, wheel from the unpacked sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(out), "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        sdist.extractall(out, filter="data")
    subprocess.run([*build, "wheel"], cwd=next(out.glob("*/")), check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_every_tracked_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    """Package data and what ships beside it, byte for byte, and nothing else."""
    sources = {str(path): path for path in _git_files(PACKAGE)}
    for here, there in SHIPPED.items():
        sources |= {str(path).replace(here, there, 1): path for path in _git_files(here) if not _stays(path)}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert packed == set(sources)
    assert [name for name, path in sources.items() if wheel.read(name) != (ROOT / path).read_bytes()] == []


def test_no_links_are_tracked() -> None:
    """A clone on Windows gets text files for links, and one file can be imported as two modules."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-s"], check=True, capture_output=True, text=True
    ).stdout
    assert [line for line in listed.splitlines() if line.startswith("120000")] == []


def test_wheel_puts_the_optimum_command_on_the_path(wheel: zipfile.ZipFile) -> None:
    """The line of the .pth file is a folder of the wheel in which optimum looks for commands."""
    line = wheel.read("fbqat_hub_optimum.pth").decode().strip()
    assert f"{line}/optimum/commands/register/register_fbqat.py" in wheel.namelist()


def test_wheel_carries_license_and_command(wheel: zipfile.ZipFile) -> None:
    metadata = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(metadata["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert b"fbqat = fbqat_hub.cli:main" in wheel.read(metadata["entry_points.txt"])


def test_import_is_quiet(tmp_path: Path) -> None:
    """`import fbqat_hub` prints nothing, writes nothing and leaves the extras' libraries alone."""
    # peft is missing here on purpose: diffusers itself imports it where it is installed.
    extras = ["datasets", "evaluate", "matplotlib", "onnx", "onnxruntime", "optimum", "resvg_py", "torchvision"]
    code = f"import sys, {PACKAGE}; sys.exit(', '.join(name for name in {extras!r} if name in sys.modules) or None)"
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_tests_of_the_quantizer_bring_no_diffusers() -> None:
    """They are the ones to run while kernels are written, and start in half the time without it."""
    files = [path.stem for path in sorted((ROOT / "tests" / "quantization").glob("test_*.py"))]
    code = (
        f"import importlib, sys\nfor name in {files}: importlib.import_module(f'tests.quantization.{{name}}')\n"
        "print([name for name in ('diffusers', 'transformers', 'accelerate') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    """constraints.txt is what we test with: each direct dependency has one exact pin that its bound allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [requirement for group in groups for requirement in map(Requirement, group)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {_canonical(name): version for name, version in (line.split("==") for line in lines)}

    assert len(pins) == len(lines)
    for requirement in wanted:
        if _canonical(requirement.name) != _canonical(project["name"]):
            assert requirement.specifier.contains(pins[_canonical(requirement.name)]), str(requirement)


def test_readme_map_names_existing_paths() -> None:
    """In the table of "## The tree": the paths of a row's first cell, and the files named beside it."""
    section = (ROOT / "README.md").read_text().split("\n## The tree\n")[1].split("\n## ")[0]
    paths = []
    for row in re.findall(r"^\| *(`.*)\|$", section, re.MULTILINE):
        first, beside = row.split("|", 1)
        folders = [ROOT / name for name in re.findall(r"`([^`]+)`", first)]
        paths += folders
        paths += [folders[0] / name for name in re.findall(r"`(\w+(?:\.py|/))`", beside)]
        paths += [ROOT / name for name in re.findall(r"\]\(([^):]+)\)", beside)]

    assert len(paths) > 10
    assert [str(path) for path in paths if not path.exists()] == []


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
