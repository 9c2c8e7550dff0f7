"""`optimum-cli quantize` and `export qnn`, registered through the namespace package, and optimum's quantizer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaTransformer2DModel

import fbqat_hub
from fbqat_hub.cli import main
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import ROOT, subprocess_environment
from tests.integrations.tiny import predict

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


def test_quantize_is_fbqat_convert(tmp_path: Path, teacher_of: Callable[[str], Path]) -> None:
    pytest.importorskip("optimum")
    source, output, same = str(teacher_of("sana")), tmp_path / "by optimum", tmp_path / "by fbqat"
    done = optimum_cli("quantize", "--model", source, str(output), "--average-bits", "4.5", "--leave", "proj_out")
    assert done.returncode == 0, done.stderr
    assert main(["convert", source, "--output", str(same), "--average-bits", "4.5", "--leave", "proj_out"]) == 0
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (output / weights).read_bytes() == (same / weights).read_bytes()
    again = optimum_cli("quantize", "--model", source, str(output))
    assert again.returncode == 1
    assert "by optimum" in again.stderr.splitlines()[-1]
    assert "Traceback" not in again.stderr
    wrong = optimum_cli("quantize", "--model", str(tmp_path / "nowhere"), str(tmp_path / "x"))
    assert wrong.returncode
    assert "nowhere" in wrong.stderr.splitlines()[-1]


def test_export_has_every_option_of_fbqat_export(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optimum")
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    ours = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)) - {"--to", "--output", "--help"}
    assert ours <= set(re.findall(r"--[a-z0-9-]+", optimum_cli("export", "qnn", "--help").stdout))


@pytest.mark.parametrize("document", ["README.md", "docs/htp.md"])
def test_what_the_documents_show_is_read(document: str) -> None:
    """`--soc` takes several, and would take the output for one of them."""
    pytest.importorskip("optimum")
    shown = re.findall(r"optimum-cli export qnn ([^`#\n]*)", (ROOT / document).read_text(encoding="utf-8"))
    assert shown
    for command in shown:
        wrong = optimum_cli("export", "qnn", *command.replace("runs/tiny", "nosuch").split())
        assert "nosuch is no folder, nor a Hub id" in wrong.stderr, wrong.stderr


def test_an_error_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("optimum")
    done = optimum_cli("export", "qnn", "--model", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 1
    assert "is not a diffusers pipeline: it has no model_index.json" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_namespace_has_no_init_file() -> None:
    """One of them would hide optimum itself."""
    assert not list(NAMESPACE.rglob("__init__.py"))
    assert [path.relative_to(NAMESPACE).as_posix() for path in NAMESPACE.rglob("*.py")] == [
        "optimum/commands/register/register_fbqat.py"
    ]


def test_the_commands_bring_no_heavy_module() -> None:
    """Every call of optimum-cli imports them and makes their parsers."""
    pytest.importorskip("optimum")
    script = """
import json, sys
import optimum.commands.export.base
before = set(sys.modules)
import argparse
from optimum.commands.register.register_fbqat import QNNExportCommand, QuantizeCommand
for command in (QNNExportCommand, QuantizeCommand):
    command.parse_args(argparse.ArgumentParser())
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    path = f"{ROOT}:{NAMESPACE}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=subprocess_environment(PYTHONPATH=path),
    )
    brought = {name.partition(".")[0] for name in json.loads(done.stdout)} - set(sys.stdlib_module_names)
    assert brought == {"optimum", "fbqat_hub", "safetensors"}


# the quantizer


@pytest.fixture(scope="module")
def quantizer() -> Any:
    pytest.importorskip("optimum")
    return fbqat_hub.FBQATQuantizer


def test_it_is_one_of_optimum(quantizer: Any) -> None:
    from optimum.quantization_base import OptimumQuantizer

    assert issubclass(quantizer, OptimumQuantizer)


def test_a_folder_becomes_what_convert_makes_of_it(quantizer: Any, tiny_sana: Path, tmp_path: Path) -> None:
    settings = {"average_bits": 4.5, "modules_to_not_convert": ["proj_out"]}
    made = quantizer.from_pretrained(tiny_sana).quantize(save_dir=tmp_path / "made", progress=False, **settings)
    assert made == tmp_path / "made"
    wanted = convert_pipeline(str(tiny_sana), tmp_path / "wanted", settings, progress=False)
    files = {path.relative_to(wanted) for path in wanted.rglob("*") if path.is_file()} - {Path("recipe.yaml")}
    assert files
    for file in files:
        assert (made / file).read_bytes() == (wanted / file).read_bytes(), file


def test_a_loaded_denoiser_becomes_the_same(
    quantizer: Any, tiny_sana: Path, packed_folder: Path, tmp_path: Path
) -> None:
    original = load_pipeline(tiny_sana).transformer
    before = predict(original, "sana")
    made = quantizer.from_pretrained(original).quantize(save_dir=tmp_path / "made")
    assert torch.equal(predict(original, "sana"), before)
    loaded = SanaTransformer2DModel.from_pretrained(made)
    wanted = DiffusionPipeline.from_pretrained(packed_folder).transformer
    assert list(named_layers(loaded, PackedLayer))
    assert torch.equal(predict(loaded, "sana"), predict(wanted, "sana"))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("sana", {"file_name": "model.onnx"}, "a pipeline is a folder, give that and leave file_name out"),
        ("transformer", {}, "is not a diffusers pipeline: it has no model_index.json"),
        ("no/such/folder", {}, "is no folder, nor a Hub id"),
        ("module", {}, "a Linear was given; give a pipeline's folder or Hub id, or its denoiser"),
        ("vae", {}, "AutoencoderDC is of no supported family"),
        ("packed", {}, "this SanaTransformer2DModel is quantized already"),
    ],
)
def test_what_it_does_not_take(
    quantizer: Any, given: str, options: dict[str, Any], message: str, tiny_sana: Path, packed_folder: Path
) -> None:
    source: Any = {
        "sana": lambda: tiny_sana,
        "transformer": lambda: tiny_sana / "transformer",
        "module": lambda: torch.nn.Linear(2, 2),
        "vae": lambda: load_pipeline(tiny_sana).vae,
        "packed": lambda: load_pipeline(packed_folder).transformer,
    }.get(given, lambda: given)()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        quantizer.from_pretrained(source, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_prefix": "w4"}, "the format names the files, leave file_prefix out"),
        ({"averge_bits": 4.5}, r"'averge_bits' \(did you mean 'average_bits'\?\)"),
        ({"text_encoders": "w9"}, "w9"),
    ],
)
@pytest.mark.parametrize("of", ["a folder", "a denoiser"])
def test_what_it_does_not_do(
    quantizer: Any, of: str, options: dict[str, Any], message: str, tiny_sana: Path, tmp_path: Path
) -> None:
    if of == "a denoiser" and "text_encoders" in options:
        message = "a denoiser has none"
    source = tiny_sana if of == "a folder" else load_pipeline(tiny_sana).transformer
    with pytest.raises(ValueError, match=message):
        quantizer.from_pretrained(source).quantize(save_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(quantizer: Any, tiny_sana: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for source in (tiny_sana, load_pipeline(tiny_sana).transformer):
        with pytest.raises(FileExistsError, match="is not empty"):
            quantizer.from_pretrained(source).quantize(save_dir=tmp_path)
