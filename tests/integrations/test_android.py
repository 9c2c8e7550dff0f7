"""The C++ runner of a bundle: on the emulator the Python runner's picture to the bit; damage and misuse are said."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbqat_hub.export.bundle.embeddings import save_embeddings
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.export.bundle.pipeline import picture_psnr
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import CAPTIONS, ROOT, call_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built as its README says."""
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("cmake and a C++ compiler are needed to build it")
    build = tmp_path_factory.mktemp("build")
    for command in (["cmake", "-S", ROOT / "integrations/android", "-B", build], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_bundle"


def run(runner: Path, bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    import onnxruntime
    import onnxruntime_qnn

    (runtime,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    plugin, backend = onnxruntime_qnn.get_library_path(), onnxruntime_qnn.get_qnn_htp_path()
    libraries = ["--runtime", runtime, "--plugin", plugin, "--backend", backend]
    return subprocess.run([runner, bundle, *libraries, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(("family", "graphs", "size"), [("sana", 2, (64, 64)), ("flux", 1, (64, 48))])
def test_the_picture_is_the_python_runner_s(
    family: str, graphs: int, size: tuple[int, int], runner: Path, teacher_of, tmp_path: Path
) -> None:
    """Two branches, two graphs and a decoder in tiles (Sana); tokens of 2 x 2 latents and a decoder that is cut at its
    group norms (FLUX.1); of a prompt, and of embeddings."""
    pytest.importorskip("onnxruntime_qnn")
    pipeline = load_pipeline(convert_pipeline(str(teacher_of(family)), tmp_path / "packed"))
    bundle, call = tmp_path / "bundle", call_of(family, pipeline) | {"height": size[0], "width": size[1]}
    certificate = export_bundle(
        pipeline,
        bundle,
        prompts=CAPTIONS[:3],
        call=call,
        precision="w8a16",
        graphs=graphs,
        pictures=2,
        decoder_tile=32,
        progress=False,
    )
    # between group norms it is the whole picture, blended it is near
    assert certificate["decoder_tiles"]["psnr_db"] > (90 if family == "flux" else 20)
    save_embeddings(pipeline, CAPTIONS[2], call, tmp_path / "text.safetensors")
    pictures = []
    for options in (["--prompt", "1"], ["--embeddings", str(tmp_path / "text.safetensors")]):
        ours, reference = tmp_path / "ours.ppm", tmp_path / "python.png"
        done = run(runner, bundle, *options, "--output", str(ours))
        assert done.returncode == 0, done.stderr
        script = [sys.executable, bundle / "generate.py", *options, "--output", reference]
        subprocess.run(script, check=True, capture_output=True)
        pictures.append(np.asarray(Image.open(ours)))
        assert np.array_equal(pictures[-1], np.asarray(Image.open(reference)))
    assert not np.array_equal(*pictures)
    near_torch = picture_psnr(np.asarray(Image.open(bundle / "pictures" / "1-torch.png")), pictures[0])
    assert near_torch > 25, near_torch

    for prompt in ("2", "", "1x"):
        assert "the bundle has 2 prompts, counted from 0" in run(runner, bundle, "--prompt", prompt).stderr
    for place in (tmp_path, tmp_path / "nosuch" / "a.ppm"):
        done = run(runner, bundle, "--output", str(place), "--runtime", "nosuch.so")
        assert f"run_bundle: cannot write {place}" in done.stderr
    decoder = max(bundle.glob("decoder*.bin"))
    raw = bytearray(decoder.read_bytes())
    raw[len(raw) // 2] ^= 1
    decoder.write_bytes(bytes(raw))
    done = run(runner, bundle, "--output", str(tmp_path / "damaged.ppm"))
    assert done.returncode == 1
    assert f"run_bundle: {decoder.name} is damaged: SHA-256 is" in done.stderr
    assert not (tmp_path / "damaged.ppm").exists()


def test_what_is_no_bundle_or_no_option_is_refused(runner: Path, tmp_path: Path) -> None:
    assert run(runner, tmp_path).stderr == f"run_bundle: cannot open {tmp_path}/manifest.json\n"
    (tmp_path / "manifest.json").write_text('{"sampler": [1, ')
    assert "run_bundle: JSON: it ends too early" in run(runner, tmp_path).stderr
    done = run(runner, tmp_path, "--seed", "7")
    assert (done.returncode, done.stderr[:17]) == (2, "run_bundle BUNDLE")
