"""The whole life of every model without a teacher that ships, with random weights: from its float pipeline to the Hub.

Convert, train 20 steps, interrupt and resume to the same bits, measure, card, publish, load and generate in a fresh
process, pull, generate the same again; export the denoiser, or an error that says what is not supported.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from fbqat_hub import cli
from fbqat_hub.evaluation.results import read_records
from fbqat_hub.export import PRESETS, export_htp
from fbqat_hub.export.bundle.doctor import diagnose_pipeline
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.export.bundle.pipeline import record_inputs
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp.checks import check_bundle
from fbqat_hub.families import FAMILIES
from fbqat_hub.hub.card import write_card
from fbqat_hub.hub.publish import publish
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training import checkpoint, loop
from fbqat_hub.training.distill import train
from fbqat_hub.training.evaluate import evaluate
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe
from tests.conftest import MODELS, VARIANTS, call_of, family_name, subprocess_environment
from tests.hub.conftest import TOKEN
from tests.hub.server import LoopbackHub

WITHOUT_TEACHER = [model for model in MODELS if model in VARIANTS or not FAMILIES[model].tiny]
NO_BUNDLE = [model for model in WITHOUT_TEACHER if FAMILIES[family_name(model)].without_bundle]
LICENCE = "license: apache-2.0\nlicense_link: https://example.org/licence\nattribution: Nobody.\n"


def interrupted(patch: pytest.MonkeyPatch, step: int) -> None:
    """Stop instead of writing the checkpoint of ``step``."""
    save = checkpoint.save_checkpoint

    def saving(folder: Path, done: int, *rest: Any, **options: Any) -> None:
        if done == step:
            raise KeyboardInterrupt
        save(folder, done, *rest, **options)

    patch.setattr(loop, "save_checkpoint", saving)


@pytest.mark.slow
@pytest.mark.parametrize("model", WITHOUT_TEACHER)
def test_whole_life(
    model: str, teacher_of: Callable[[str], Path], recipe_fields: dict[str, Any], hub: LoopbackHub, tmp_path: Path
) -> None:
    teacher, family = teacher_of(model), FAMILIES[family_name(model)]
    call = call_of(model, load_pipeline(teacher))
    changes = {"family": family.name, "teacher": str(teacher), "generation": call, "steps": 20, "save_every": 8}
    recipe = Recipe(**{**recipe_fields, **changes, "name": f"Tiny-{model}", "prompts": ["dark red"]})
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, 16)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run, progress=False)
    train(recipe, run, resume=True, progress=False)
    weights = Path("transformer/diffusion_pytorch_model.safetensors")
    whole, resumed = (load_file(at / weights) for at in (train(recipe, tmp_path / "whole", progress=False), run))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    untrained = load_file(convert_pipeline(str(teacher), tmp_path / "converted") / weights)
    assert untrained.keys() == whole.keys()
    assert any(not torch.equal(untrained[name], value) for name, value in whole.items())

    evaluate(run, metrics=["psnr", "kd_loss"], progress=False)
    records = {record.metric: record for record in read_records(run / "results.json")}
    assert records["kd_loss"].value > 0
    assert 10 < records["psnr"].value < 99
    results = run / "results.json"  # a data set of one's own has no name that may be published
    results.write_text(results.read_text().replace(recipe_fields["dataset"]["path"], "squares"))
    (run / "card.yaml").write_text(LICENCE)
    write_card(run)
    repo = f"me/{model}"
    publish(run, repo)
    code = re.search(r"```python\n(.*?)```", hub.repositories[repo].files["README.md"].content.decode(), re.DOTALL)
    assert code is not None
    fresh = subprocess_environment(
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1"
    )
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, env=fresh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cli.main(["pull", repo, "--output", str(tmp_path / "pulled"), "--for", "diffusers"]) == 0
    again = str(tmp_path / "again.png")
    assert cli.main(["generate", str(tmp_path / "pulled"), "dark red", "--seed", "1234", "--output", again]) == 0
    drawn = Image.open(tmp_path / "picture.png")
    assert drawn.size == (32, 32)
    assert ImageChops.difference(drawn, Image.open(again)).getbbox() is None


@pytest.mark.slow
@pytest.mark.parametrize("model", WITHOUT_TEACHER)
def test_the_denoiser_is_exported_or_says_why_not(
    model: str, teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_qnn")
    pipeline = load_pipeline(convert_pipeline(str(teacher_of(model)), tmp_path / "packed"))
    family = FAMILIES[family_name(model)]
    if family.without_graph:
        with pytest.raises(ValueError, match=f"a {re.escape(family.title)} cannot be exported: "):
            export_htp(pipeline.transformer, [], [], tmp_path / "out", precision=PRESETS["w8a16"], progress=False)
        return
    items = record_inputs(pipeline, ["red", "sky", "mint"], call_of(model, pipeline))
    result = export_htp(
        pipeline.transformer, items[:-2], items[-2:], tmp_path / "out", precision=PRESETS["w8a16"], progress=False
    )
    assert result["model"]["packed_layers"] == len(list(named_layers(pipeline.transformer, PackedLayer)))
    assert result["parity"]["emulator_vs_torch_packed"]["sqnr_db"] > 15  # as of the teachers that ship


@pytest.mark.parametrize("model", NO_BUNDLE)
def test_a_pipeline_without_a_bundle_says_why(model: str, teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline = load_pipeline(convert_pipeline(str(teacher_of(model)), tmp_path / "packed"))
    family = FAMILIES[family_name(model)]
    why = f"a {re.escape(family.title)} cannot be (bundled|exported): "
    with pytest.raises((ValueError, ExportError), match=why):
        check_bundle(pipeline)
    errors = [finding.what for finding in diagnose_pipeline(pipeline) if finding.level == "error"]
    assert [what for what in errors if re.match(why, what)]


@pytest.mark.parametrize(
    ("model", "guidance"),
    [
        ("flux-dev", {"true_cfg_scale": 3.0, "negative_prompt": ""}),
        ("sd3.5-large", {"skip_guidance_layers": [0]}),
    ],
)
def test_guidance_that_the_runner_does_not_compute_is_refused(
    model: str, guidance: dict[str, Any], teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline = load_pipeline(convert_pipeline(str(teacher_of(model)), tmp_path / "packed"))
    check_bundle(pipeline, call={"true_cfg_scale": 3.0, "guidance_scale": 3.0})  # unused without a negative prompt
    with pytest.raises(ExportError, match=f"the call has {next(iter(guidance))}, and a bundle's runner guides by"):
        check_bundle(pipeline, call=guidance)


@pytest.mark.slow
def test_a_bundle_of_flux_dev_generates_another_text_with_its_guidance_scale(
    teacher_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The scale is an input of the denoiser that no text encoder makes."""
    pytest.importorskip("onnxruntime_qnn")
    pipeline = load_pipeline(convert_pipeline(str(teacher_of("flux-dev")), tmp_path / "packed"))
    bundle, call = tmp_path / "bundle", call_of("flux-dev", pipeline)
    made = export_bundle(
        pipeline, bundle, prompts=["red", "sky", "mint"], call=call, precision="w8a16", pictures=1, progress=False
    )
    assert made["text_left_out"] is None
    command = [sys.executable, str(bundle / "generate.py"), "--text", "dark red", "--output", str(tmp_path / "p.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "p.png").size == (32, 32)
