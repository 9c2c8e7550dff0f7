"""The bundle: a picture from its files alone, without torch; damage is seen; the host's sampler is the pipeline's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.numpy import load_file, save_file

from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle import export, text_encoder
from fbqat_hub.export.bundle.embeddings import save_embeddings
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.export.bundle.pipeline import encode_prompts, picture_psnr
from fbqat_hub.export.bundle.sampler import sampler_matrix
from fbqat_hub.export.bundle.text_bundle import PROBE, quantize_text
from fbqat_hub.export.bundle.text_encoder import ENCODER_MASK_BIAS, recorded_tokens
from fbqat_hub.export.onnx import calibration, rewrite
from fbqat_hub.export.progress import Progress
from fbqat_hub.export_run import export_run
from fbqat_hub.families.graph import MASK_BIAS
from fbqat_hub.files import sha256
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import CALL, CAPTIONS, call_of

#: Runs a script where torch, diffusers and everything of ours cannot be imported.
WITHOUT_TORCH = (
    "import sys, runpy; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers', 'fbqat_hub')));"
    "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


#: Before every prompt, as the real checkpoints have it by default.
INSTRUCTION = ["Draw", "the Text: "]


@pytest.fixture(scope="module")
def bundle(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Of an untrained pipeline: its decoder's norms have biases of 0, which only `rewrite.drop_zero_bias` cures."""
    pytest.importorskip("onnxruntime_qnn")
    folder = tmp_path_factory.mktemp("bundle")
    pipeline = load_pipeline(convert_pipeline(str(tiny_sana), folder / "packed"))
    call = {**CALL, "complex_human_instruction": INSTRUCTION}
    certificate = export_bundle(pipeline, folder / "out", prompts=CAPTIONS[:3], call=call, pictures=1, progress=False)
    return folder / "out", certificate


@pytest.mark.slow
def test_several_chips_have_a_bundle_each_of_work_done_once(
    bundle: tuple[Path, dict[str, Any]], tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is for its chip, and that of a chip alone to the bit; graphs are traced and calibrated once."""
    calls: Counter[str] = Counter()
    for module, name in ((rewrite, "traced"), (calibration, "calibrate")):
        monkeypatch.setattr(module, name, counted(getattr(module, name), name, calls))
    pipeline = load_pipeline(convert_pipeline(str(tiny_sana), tmp_path / "packed"))
    call, socs = {**CALL, "complex_human_instruction": INSTRUCTION}, ["sm8750", "sm8650"]
    certificates = export_bundle(
        pipeline, tmp_path / "out", prompts=CAPTIONS[:3], call=call, soc=socs, pictures=1, progress=False
    )
    assert calls == {"traced": 3, "calibrate": 3}  # transformer, decoder, text encoder
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*socs, "README.md"}
    for soc, architecture in zip(socs, ("79:69", "75:57"), strict=True):
        folder = tmp_path / "out" / soc
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["target"]["soc"] == soc
        assert architecture in certificates[soc]["read_back"]["compatibility_info"]
        assert certificates[soc]["parity"]["emulator_vs_torch_packed"]["sqnr_db"] > 15
        assert certificates[soc]["pictures"]["mean_psnr_db"] > 30
        assert {path.name for path in folder.iterdir()} == {path.name for path in bundle[0].iterdir()}
    for name in ("transformer.bin", "decoder.bin", "text_encoder.bin"):
        assert sha256(tmp_path / "out" / "sm8750" / name) == sha256(bundle[0] / name)
        assert sha256(tmp_path / "out" / "sm8650" / name) != sha256(bundle[0] / name)
    for name in ("golden.safetensors", "host.safetensors"):
        assert sha256(tmp_path / "out" / "sm8750" / name) == sha256(bundle[0] / name)
    table = (tmp_path / "out" / "README.md").read_text()
    assert "| `sm8650` | Snapdragon 8 Gen 3 | v2:" in table
    assert f"| {certificates['sm8650']['parity']['emulator_vs_torch_packed']['sqnr_db']:.1f} |" in table


def counted(function: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    def call(*positional: Any, **keywords: Any) -> Any:
        calls[name] += 1
        return function(*positional, **keywords)

    return call


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-c", WITHOUT_TORCH, str(folder / "generate.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def test_the_runner_generates_the_picture_without_torch(bundle: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Denoiser, sampler and decoder from the files alone: near torch's picture, and another seed's is another."""
    folder, certificate = bundle
    for name, options in {"same": [], "other": ["--seed", "7"]}.items():
        done = run(folder, "--output", str(tmp_path / f"{name}.png"), *options)
        assert done.returncode == 0, done.stderr
    same, other = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("same", "other"))
    torch_picture = np.asarray(Image.open(folder / "pictures" / "0-torch.png"))
    assert picture_psnr(torch_picture, same) > 30
    assert picture_psnr(torch_picture, other) < picture_psnr(torch_picture, same) - 6
    assert certificate["pictures"]["mean_psnr_db"] > 30
    assert certificate["graphs"]["decoder"]["parity"]["emulator_vs_torch_packed"]["sqnr_db"] > 30


def test_the_runner_generates_a_text(bundle: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The first prompt's own text makes the first prompt's picture, in any case, as Sana's pipeline has it."""
    folder, certificate = bundle
    done = run(folder, "--text", f" {CAPTIONS[0].upper()} ", "--output", str(tmp_path / "same.png"))
    assert done.returncode == 0, done.stderr
    torch_picture = np.asarray(Image.open(folder / "pictures" / "0-torch.png"))
    assert picture_psnr(torch_picture, np.asarray(Image.open(tmp_path / "same.png"))) > 30
    assert certificate["graphs"]["text_encoder"]["parity"]["emulator_vs_torch_packed"]["sqnr_db"] > 30
    assert json.loads((folder / "manifest.json").read_text())["text"] == [
        {
            "encoder": "text_encoder",
            "graphs": ["text_encoder"],
            "tokenizer": "tokenizer.json",
            "table": "embedding.text_encoder.safetensors",
            "lower": True,
            "instruction": "\n".join(INSTRUCTION),
            "kept": CALL["max_sequence_length"],
            "bias": "causal",
            "mask_bias": ENCODER_MASK_BIAS,
            "end": None,
        }
    ]


def test_a_bundle_without_text_encoders_says_what_to_do_and_takes_embeddings(
    bundle: tuple[Path, dict[str, Any]], tiny_sana: Path, tmp_path: Path
) -> None:
    """The runner names the reason and the way out; a text encoded by the pipeline makes that text's picture."""
    without = shutil.copytree(bundle[0], tmp_path / "without")
    manifest = json.loads((without / "manifest.json").read_text()) | {"text": [], "text_left_out": "too large"}
    (without / "manifest.json").write_text(json.dumps(manifest))
    done = run(without, "--text", CAPTIONS[0])
    assert done.returncode != 0
    assert "no text encoders: too large. Choose with --prompt, or give with --embeddings" in done.stderr
    pipeline = load_pipeline(convert_pipeline(str(tiny_sana), tmp_path / "packed"))
    call = {**CALL, "complex_human_instruction": INSTRUCTION}
    for place in (0, 1):
        save_embeddings(pipeline, CAPTIONS[place], call, tmp_path / f"{place}.safetensors")
        picture = tmp_path / f"{place}.png"
        done = run(without, "--embeddings", str(tmp_path / f"{place}.safetensors"), "--output", str(picture))
        assert done.returncode == 0, done.stderr
    torch_picture = np.asarray(Image.open(without / "pictures" / "0-torch.png"))
    same, other = (picture_psnr(torch_picture, np.asarray(Image.open(tmp_path / f"{n}.png"))) for n in (0, 1))
    assert same > 30
    assert other < same
    save_file({"encoder_hidden_states": np.zeros((1, 2, 3), np.float32)}, tmp_path / "short.safetensors")
    done = run(without, "--embeddings", str(tmp_path / "short.safetensors"))
    assert done.returncode != 0
    assert "this bundle takes {'encoder_" in done.stderr


@pytest.mark.slow
def test_the_runner_generates_with_two_graphs_and_decodes_in_tiles(tmp_path: Path) -> None:
    """The picture of the bundle's own runner, without torch, near torch's; the manifest names the tensor at the cut."""
    pytest.importorskip("onnxruntime_qnn")
    packed = convert_pipeline("fbqat-hub/sana-tiny-openmoji", tmp_path / "packed")
    call = call_of("sana", pipeline := load_pipeline(packed)) | {"height": 64, "width": 64}
    bundle = tmp_path / "out"
    certificate = export_bundle(
        pipeline, bundle, prompts=CAPTIONS[:3], call=call, pictures=1, graphs=2, decoder_tile=32, progress=False
    )
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["graphs"]["decoder"]["inputs"][0]["shape"][2:] == [4, 4]
    assert manifest["decoder_tiles"] == {"size": [32, 32], "overlap": [16, 16]}
    assert certificate["decoder_tiles"]["count"] == 9
    assert 20 < certificate["decoder_tiles"]["psnr_db"] < 60
    assert "9 tiles of 32 x 32 pixels that overlap by 16;" in (bundle / "certificate.md").read_text()
    chain = manifest["denoiser"]
    assert [part["graph"] for part in chain] == ["transformer_0", "transformer_1"]
    assert set(chain[0]["reads"].values()) == {"host"}
    assert set(chain[1]["reads"].values()) == {"transformer_0"}
    done = run(bundle, "--output", str(tmp_path / "picture.png"))
    assert done.returncode == 0, done.stderr
    pictures = [Image.open(path) for path in (tmp_path / "picture.png", bundle / "pictures" / "0-torch.png")]
    assert picture_psnr(*(np.asarray(picture) for picture in pictures)) > 20


@pytest.mark.slow
def test_a_quick_export_of_encoders_that_came_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward and one block are compared, one of the encoder's graphs is emulated, and no picture is made on the
    emulator; the bundle is whole all the same."""
    pytest.importorskip("onnxruntime_qnn")
    monkeypatch.setattr(text_encoder, "MOST_WEIGHTS", 1)
    bars: list[Progress] = []
    monkeypatch.setattr(export, "Progress", lambda *given: bars.append(Progress(*given)) or bars[-1])
    packed = convert_pipeline("fbqat-hub/sana-tiny-openmoji", tmp_path / "packed", text_encoders="w8")
    bundle = tmp_path / "out"
    prompts = CAPTIONS[:3]
    certificate = export_run(packed, bundle, prompts=prompts, pictures=1, samples=5, quick=True, progress=False)
    assert [(bar._done, len(bar.seconds)) for bar in bars] == [(bars[0]._total, bars[0]._total)]
    assert (certificate["pictures"], certificate["calibration_inputs"]) == (None, 5)
    assert certificate["probed_blocks"]["probed"] == 1 < certificate["probed_blocks"]["of"]
    assert len(certificate["parity"]["timesteps"]) == certificate["golden_inputs"] == 1
    emulated = {name: each["emulator"] is not None for name, each in certificate["graphs"].items()}
    assert emulated == {"decoder": True, "text_encoder-0": True, "text_encoder-1": False}
    assert certificate["graphs"]["text_encoder-1"]["parity"]["cpu_qdq_vs_torch_packed"]["sqnr_db"] > 30
    text = (bundle / "certificate.md").read_text()
    assert "No picture was generated on the emulator." in text
    assert "| **text_encoder-1** | not emulated | not emulated | " in text
    assert "No single ops were compared in `decoder`, `text_encoder-0`, `text_encoder-1`." in text
    assert [path.name for path in (bundle / "pictures").iterdir()] == ["0-torch.png"]
    torch_picture = np.asarray(Image.open(bundle / "pictures" / "0-torch.png"))
    for options in ((), ("--text", prompts[0])):
        done = run(bundle, *options, "--output", str(tmp_path / "picture.png"))
        assert done.returncode == 0, done.stderr
        assert picture_psnr(torch_picture, np.asarray(Image.open(tmp_path / "picture.png"))) > 15  # ranges of 5 inputs


@pytest.mark.parametrize("change", ["preprocessing", "encoder"])
def test_text_encoders_that_cannot_be_exported_are_left_out(
    change: str, tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline changes prompts in a way of its own; or its encoder is of a class without a graph."""
    pipeline = load_pipeline(tiny_sana)
    if change == "preprocessing":
        pipeline._text_preprocessing = lambda prompts, **_: [f"a {prompt}" for prompt in prompts]
    with recorded_tokens(pipeline) as tokens:
        encode_prompts(pipeline, [PROBE], CALL)
    if change == "encoder":
        monkeypatch.delitem(text_encoder.GRAPHS, "Gemma2Model")
    bar = Progress(1, shown=False)
    found = quantize_text(pipeline, tokens, CAPTIONS, CAPTIONS[:1], "", tmp_path, bar)
    expected = {"preprocessing": "changes its prompts", "encoder": "text encoder Gemma2Model"}[change]
    assert expected in str(found.left_out)
    assert (found.described, found.files, list(tmp_path.iterdir())) == ([], [], [])


def test_a_flipped_byte_is_seen(bundle: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """QNN itself loads such a binary without complaint."""
    damaged = shutil.copytree(bundle[0], tmp_path / "damaged")
    raw = bytearray((damaged / "transformer.bin").read_bytes())
    raw[len(raw) // 2] ^= 1
    (damaged / "transformer.bin").write_bytes(bytes(raw))
    done = run(damaged, "--output", str(tmp_path / "picture.png"))
    assert done.returncode != 0
    assert "transformer.bin is damaged" in done.stderr
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--output", "{tmp}/a.nosuch"], "output is {tmp}/a.nosuch; it must be a file that ends in .png"),
        (["--output", "{tmp}/missing/a.png"], "{tmp}/missing is no folder that can be written to"),
        (["--seed", "-1"], "seed is -1; give a whole number from 0 on"),
        (["--prompt", "9"], "prompt 9: the bundle has 1 prompts, counted from 0"),
        (["--embeddings", "{tmp}/none.safetensors"], "{tmp}/none.safetensors cannot be read as safetensors: "),
        (["--embeddings", "{tmp}/nan.safetensors"], "encoder_hidden_states is not finite"),
    ],
)
def test_what_the_runner_cannot_do_is_one_line(
    options: list[str], says: str, bundle: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """And no graph was opened by then."""
    stored = load_file(bundle[0] / "host.safetensors")
    text = {name: stored[f"prompt.0.1.{name}"] for name in ("encoder_hidden_states", "encoder_attention_bias")}
    text["encoder_hidden_states"][0, 0, 0] = np.nan
    save_file(text, tmp_path / "nan.safetensors")
    given = [option.format(tmp=tmp_path) for option in ["--output", "{tmp}/a.png", *options]]
    done = run(bundle[0], *given)
    assert done.returncode == 1
    assert says.format(tmp=tmp_path) in done.stderr
    assert done.stderr.startswith("generate.py: error: ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


@pytest.mark.parametrize(("text", "says"), [("{", "is damaged: Expecting"), ('{"files": {}}', "it lacks denoiser")])
def test_a_damaged_manifest_is_said_by_the_runner(
    text: str, says: str, bundle: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    damaged = shutil.copytree(bundle[0], tmp_path / "damaged")
    (damaged / "manifest.json").write_text(text)
    done = run(damaged, "--output", str(tmp_path / "a.png"))
    assert done.returncode == 1
    assert f"generate.py: error: {damaged}/manifest.json " in done.stderr
    assert says in done.stderr


def test_the_manifest_lists_every_file_and_tensor(bundle: tuple[Path, dict[str, Any]]) -> None:
    folder, certificate = bundle
    manifest = json.loads((folder / "manifest.json").read_text())
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == present - {"manifest.json"}
    assert all(sha256(folder / name) == described["sha256"] for name, described in manifest["files"].items())
    assert manifest["target"] | {"soc_model": 69, "htp_arch": "v79", "vtcm_mb": 8} == manifest["target"]
    assert manifest["qnn_sdk_build"] == certificate["read_back"]["qnn_sdk_build"]
    assert [tensor["name"] for tensor in manifest["graphs"]["decoder"]["inputs"]] == ["latents"]
    settings = {"steps": 2, "branches": 2, "guidance_scale": 3.0, "token_grid": None, "picture_size": [32, 32]}
    settings["mask_bias"] = MASK_BIAS
    assert manifest["sampler"] == settings
    golden = load_file(folder / "golden.safetensors")
    names = [tensor["name"] for tensor in manifest["graphs"]["transformer"]["inputs"]]
    assert {f"0.{name}" for name in [*names, "sample"]} <= set(golden)
    assert "@" not in (folder / "README.md").read_text()


SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": DPMSolverMultistepScheduler(),
    "dpm-flow": DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_sampler_is_a_matrix(name: str) -> None:
    """The last row alone gives the last latents; later predictions have no weight in earlier rows."""
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(6)
    matrix = sampler_matrix(scheduler)
    assert matrix.shape == (6, 7)
    assert np.abs(np.triu(matrix, k=2)).max() == 0
    assert np.abs(matrix[-1]).min() > 0 or name == "flow"


@pytest.mark.parametrize("change", [{"algorithm_type": "sde-dpmsolver++"}, {"thresholding": True}])
def test_a_sampler_that_is_no_matrix_is_refused(change: dict[str, Any]) -> None:
    scheduler = DPMSolverMultistepScheduler(**change)
    scheduler.set_timesteps(4)
    with pytest.raises(ExportError, match="not a linear function"):
        sampler_matrix(scheduler)
