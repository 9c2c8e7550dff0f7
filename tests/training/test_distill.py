"""Training: the loss falls, a run depends on its recipe and seed only, and survives what stops it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fbqat_hub.pipelines import load_pipeline, load_stage
from fbqat_hub.quantization import FakeQuantizedLinear, PackedLayer, named_layers
from fbqat_hub.training import checkpoint, loop, student
from fbqat_hub.training.distill import train
from fbqat_hub.training.method import METHODS, Optimizer
from fbqat_hub.training.recipe import Recipe
from tests.conftest import STAGES, subprocess_environment, write_recipe

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


def tensors_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / WEIGHTS)


def same_run(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert set(left) == set(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert (a / "training_log.jsonl").read_text() == (b / "training_log.jsonl").read_text()


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# what a run leaves


def test_loss_falls(recipe_of, tmp_path: Path) -> None:
    """Plain QAT from max-abs: the mean of the last ten steps is below half of the first ten's."""
    recipe = recipe_of(method="vqat", steps=80, learning_rate=3e-3, save_every=0, batch_size=8)
    losses = [line["loss"] for line in log_of(train(recipe, tmp_path / "run", progress=False))]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_what_a_run_leaves(run_folder: Path, recipe_fields: dict[str, Any]) -> None:
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "model_index.json",
        "recipe.yaml",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "training_log.jsonl",
        "transformer",
        "vae",
    ]
    pipeline = load_pipeline(run_folder)
    assert len(list(named_layers(pipeline.transformer, PackedLayer))) == 27
    assert pipeline.transformer.proj_out.activation_bits == 16
    teacher = load_pipeline(recipe_fields["teacher"])
    for name, value in teacher.vae.state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[name], value)


def test_log_follows_the_schedules(recipe_of, tmp_path: Path) -> None:
    """10 steps: two widths, warm-up of 2 steps, then a cosine."""
    stages = {"stages": [[6, 3], [4, 7]]}
    recipe = recipe_of(steps=10, validate_every=5, schedule=stages, initialization="nearest")
    lines = log_of(train(recipe, tmp_path / "run", progress=False))
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["bit_width"] for line in lines] == 3 * [6] + 7 * [4]
    assert lines[0]["learning_rate"] == pytest.approx(0.5e-3)
    assert lines[5]["learning_rate"] == pytest.approx(0.5e-3)
    assert [line["step"] for line in lines if "validation_loss" in line] == [5, 10]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_packs_and_loads(method: str, recipe_of, tmp_path: Path) -> None:
    run = train(
        recipe_of(method=method, **({} if method.startswith("ptq") else {"steps": 3})), tmp_path, progress=False
    )
    pipeline = load_pipeline(run)
    assert len(list(named_layers(pipeline.transformer, PackedLayer))) == 27
    if not method.startswith("ptq"):
        assert all(line["loss"] > 0 for line in log_of(run))
    if method == "fbqat-paper":
        # 3 steps at progress 0, 1/3 and 2/3 of 25 epochs: epoch 8.33 is the second of 4.5 bits
        assert [line["bit_width"] for line in log_of(run)] == [8, 4.5, 4]


def test_same_seed_same_run_other_seed_other_run(recipe_of, run_folder: Path, tmp_path: Path) -> None:
    same_run(train(recipe_of(), tmp_path / "again", progress=False), run_folder)
    other = train(recipe_of(seed=5), tmp_path / "other", progress=False)
    assert [line["loss"] for line in log_of(other)] != [line["loss"] for line in log_of(run_folder)]


@pytest.mark.parametrize("group", ["attention", "feed_forward"])
def test_only_the_chosen_layers_change(group: str, recipe_of, tmp_path: Path) -> None:
    """The others are what they are without training."""
    start = tensors_of(train(recipe_of(steps=1, learning_rate=0.0), tmp_path / "start", progress=False))
    run = train(recipe_of(train_layers=group, learning_rate=0.02), tmp_path / "run", progress=False)
    changed = {name for name, value in tensors_of(run).items() if not torch.equal(value, start[name])}
    mark = {"attention": ".attn", "feed_forward": ".ff."}[group]
    assert changed
    assert all(mark in name for name in changed)
    assert any(name.endswith("weight_packed") for name in changed)


@pytest.mark.parametrize(
    "quantization",
    [{"activation_range": "static"}, {"module_overrides": {"proj_out": {"bits": 16, "range": "static"}}}],
    ids=["everywhere", "one layer"],
)
def test_static_ranges_train_and_load(quantization: dict[str, Any], recipe_of, tmp_path: Path) -> None:
    recipe = recipe_of(quantization=quantization, calibration={"samples": 5, "rule": "min_max"}, steps=4, save_every=2)
    run = train(recipe, tmp_path / "run", progress=False)
    static = {name for name in tensors_of(run) if name.endswith("input_scale")}
    assert len(static) == (27 if "activation_range" in quantization else 1)
    layer = load_pipeline(run).transformer.proj_out
    assert layer.input_scale > 0
    assert 0 <= layer.input_zero_point < 2**16
    assert layer.activation_bits == 16


def test_three_bits_are_trained_for_and_stored_in_the_space_of_four(recipe_of, tmp_path: Path) -> None:
    run = train(recipe_of(quantization={"weight_bits": 3}), tmp_path / "w3", progress=False)
    codes = [layer.codes() for _, layer in named_layers(load_pipeline(run).transformer, PackedLayer)]
    assert (min(int(code.min()) for code in codes), max(int(code.max()) for code in codes)) == (-4, 3)
    assert json.loads((run / "transformer" / "config.json").read_text())["quantization_config"]["weight_bits"] == 3


# stages


def stage_tensors(run: Path, bits: int) -> dict[str, Tensor]:
    return load_file(run / "stages" / f"w{bits}" / WEIGHTS)


def test_stages_are_what_the_schedule_left_and_change_nothing(scene_of, staged_run: Path, tmp_path: Path) -> None:
    """The codes, scales and biases of the student when its last step at 8 and 6 bits was done."""
    scene = scene_of(**{**STAGES, "keep_stages": []})
    assert scene.recipe.stage_ends() == {8: 2, 7: 3, 6: 4, 5: 5}
    student = scene.student()
    seen: dict[int, dict[str, Any]] = {}

    def look(step: int) -> None:
        layers = named_layers(student, FakeQuantizedLinear)
        seen[step + 1] = {name: (*layer.codes_and_scales(), layer.bias) for name, layer in layers}
        seen[step + 1] = copy.deepcopy(seen[step + 1])

    scene.distill(student, tmp_path, look)
    assert sorted(path.name for path in (staged_run / "stages").iterdir()) == ["w6", "w8"]
    for bits, end in ((8, 2), (6, 4)):
        tensors = stage_tensors(staged_run, bits)
        assert len(seen[end]) == 27
        for name, (codes, scale, bias) in seen[end].items():
            assert torch.equal(tensors[f"{name}.weight_packed"], codes), name
            assert torch.equal(tensors[f"{name}.weight_scale"], scale), name
            assert bias is None or torch.equal(tensors[f"{name}.bias"], bias), name
    assert not torch.equal(*(stage_tensors(staged_run, bits)["proj_out.weight_packed"] for bits in (8, 6)))
    same_run(staged_run, train(scene.recipe, tmp_path / "without", progress=False))


def test_a_stage_draws_with_the_components_of_the_run(staged_run: Path, recipe_fields: dict[str, Any]) -> None:
    pipeline = load_stage(staged_run, 6)
    codes = [layer.codes() for _, layer in named_layers(pipeline.transformer, PackedLayer)]
    assert 15 < max(int(code.abs().max()) for code in codes) <= 32
    pipeline.set_progress_bar_config(disable=True)
    pictures = [
        each("red", generator=torch.Generator().manual_seed(0), output_type="pt", **recipe_fields["generation"]).images
        for each in (pipeline, load_pipeline(staged_run))
    ]
    assert not torch.equal(*pictures)
    assert [path.name for path in (staged_run / "stages" / "w6").iterdir()] == ["transformer"]
    with pytest.raises(FileNotFoundError, match="has no stage of 7 bits; it kept 8, 6"):
        load_stage(staged_run, 7)


@pytest.mark.parametrize("stop", [2, 4, 8])
def test_stages_survive_an_interruption(stop: int, recipe_of, staged_run: Path, tmp_path: Path, monkeypatch) -> None:
    """Before the checkpoint of the step that ends a stage, and after both."""
    run, recipe = tmp_path / "run", recipe_of(**STAGES)
    with monkeypatch.context() as patch:
        stop_at(patch, stop, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run, progress=False)
    if stop == 8:
        moved = (run / "stages" / "w8").rename(tmp_path / "w8")
        with pytest.raises(FileNotFoundError, match="stages/w8 is missing, and the newest checkpoint is past it"):
            train(recipe, run, resume=True, progress=False)
        moved.rename(run / "stages" / "w8")
    same_run(train(recipe, run, resume=True, progress=False), staged_run)
    for bits in (8, 6):
        one, other = stage_tensors(run, bits), stage_tensors(staged_run, bits)
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(run.rglob("*.partial*"))


@pytest.mark.parametrize("kept", [False, True])
def test_diverging_run_names_the_layer_and_says_what_to_do(kept: bool, recipe_of, tmp_path: Path) -> None:
    """Its layers are finite before the step, so what is named is the cause, and not whatever comes first."""
    recipe = recipe_of(method="vqat", learning_rate=1e30, optimizer={"warmup_steps": 0}, save_every=int(kept))
    with pytest.raises(FloatingPointError) as caught:
        train(recipe, tmp_path / "run", progress=False)
    said = str(caught.value)
    assert re.match(r"the loss is (nan|inf) at step \d+, 4 bits; the first output that is not finite is that of", said)
    assert "transformer_blocks.0" in said
    assert "Lower learning_rate (1e+30) or set optimizer.max_grad_norm." in said
    assert said.endswith("/checkpoints." if kept else "There is no checkpoint yet.")


def test_a_last_update_that_diverges_saves_nothing(recipe_of, tmp_path: Path) -> None:
    """No loss is computed after it; its clips are infinite."""
    recipe = recipe_of(method="lsq-qat", steps=1, learning_rate=1e4, optimizer={"warmup_steps": 0})
    with pytest.raises(
        FloatingPointError,
        match=r"^transformer_blocks\.0\.\S+ \(4 bits\) after the last update, step 1: its weight_scale has values that "
        r"are not finite and above 0\. Lower learning_rate \(10000\) or set optimizer.max_grad_norm\. There is no",
    ):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model_index.json").exists()


# a teacher that cannot be one


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "{run}"}, ValueError, "is quantized already; give the full-precision pipeline"),
        ({"teacher": "{run}/missing"}, FileNotFoundError, "missing is no folder, nor a Hub id"),
        ({"quantization": {"modules_to_not_convert": ["proj_uot"]}}, ValueError, "'proj_uot' matches no linear layer"),
        ({"quantization": {"module_overrides": {"x": {"bits": 16}}}}, ValueError, "'x' matches no linear layer"),
        (
            {"dataset": {"path": "openmoji", "groups": ["Smilies"]}},
            ValueError,
            r"unknown emoji groups \['Smilies'\]; known",
        ),
        ({"dataset": {"path": "./squares"}}, FileNotFoundError, "dataset.path is './squares'; there is no such folder"),
    ],
)
def test_wrong_recipe_is_refused_before_data_is_encoded_and_leaves_no_folder(
    changes, error, message: str, recipe_of, run_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """The recipe that is put right is not refused as another one."""
    monkeypatch.setattr("fbqat_hub.training.distill._encoded", lambda *_: pytest.fail("encodes data first"))
    if "teacher" in changes:
        changes = {"teacher": changes["teacher"].format(run=run_folder)}
    with pytest.raises(error, match=message):
        train(recipe_of(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_teacher_of_another_family_is_refused(recipe_of, tiny_sana: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_sana, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaPAGPipeline"}))
    with pytest.raises(ValueError, match="is a SanaPAGPipeline; sana is not its family"):
        train(recipe_of(teacher=str(other)), tmp_path / "run", progress=False)


# output folders


@pytest.mark.parametrize("resume", [False, True])
def test_folder_with_other_content_is_untouched(resume: bool, recipe_of, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty; give another --output"):
        train(recipe_of(), tmp_path, resume=resume, progress=False)
    assert entries(tmp_path) == ["thesis.tex"]


def test_finished_run_is_not_trained_again(recipe_of, run_folder: Path) -> None:
    before = (run_folder / WEIGHTS).stat().st_mtime_ns
    assert train(recipe_of(), run_folder, resume=True, progress=False) == run_folder
    with pytest.raises(FileExistsError, match="give another --output"):
        train(recipe_of(), run_folder, progress=False)
    with pytest.raises(ValueError, match=r"started with another recipe, .*: seed: 1234 -> 5. Give another --output"):
        train(recipe_of(seed=5), run_folder, resume=True, progress=False)
    assert (run_folder / WEIGHTS).stat().st_mtime_ns == before


# interruptions


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Raise ``error`` instead of writing the checkpoint of ``step``."""
    save = checkpoint.save_checkpoint

    def saving(folder: Path, done: int, *rest: Any, **options: Any) -> None:
        if done == step:
            raise error
        save(folder, done, *rest, **options)

    monkeypatch.setattr(loop, "save_checkpoint", saving)


def test_interrupted_run_resumes_to_the_bit(recipe_of, run_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Interrupted after step 4 with the checkpoint of step 2: steps 3 and 4 are run again, their log lines replaced."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe_of(), run, progress=False)
    assert entries(run / "checkpoints") == [
        "step-00000002",
        "step-00000002/recipe.yaml",
        "step-00000002/state.safetensors",
    ]
    assert not (run / "model_index.json").exists()
    with pytest.raises(FileExistsError, match="use --resume to continue it"):
        train(recipe_of(), run, progress=False)
    same_run(train(recipe_of(), run, resume=True, progress=False), run_folder)
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lsq-qat"},
        {"method": "fbqat-paper"},
        {"method": "fbqat-paper", "quantization": {"weight_clip": "learned"}},
        {"method": "vqat", "mixed_precision": "bf16"},
        {"quantization": {"average_bits": 5.0}},
    ],
    ids=["learned clip", "widths", "widths and learned clip", "bf16", "average"],
)
def test_resume_is_exact(changes: dict[str, Any], recipe_of, tmp_path: Path, monkeypatch, other_precision) -> None:
    """For every kind of clip and width, with static ranges, and under autocast. Widths change on both sides of it."""
    static = {"activation_range": "static", **changes.get("quantization", {})}
    fields = {**changes, "quantization": static, "calibration": {"samples": 4}, "steps": 8, "save_every": 3}
    recipe = recipe_of(**fields, validate_every=4)
    whole = train(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "cut", progress=False)
    for name in ("start", "chosen_widths"):  # nothing is calibrated or chosen again
        monkeypatch.setattr(student, name, None)
    same_run(train(recipe, tmp_path / "cut", resume=True, progress=False), whole)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_with_another_recipe_is_refused_and_changes_nothing(recipe_of, tmp_path: Path, monkeypatch) -> None:
    """The error lists what differs, whether it was given or is a default that changed since the run was started."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe_of(), run, progress=False)
    before = files_of(run)
    with pytest.raises(
        ValueError, match=r"another recipe, .*: learning_rate: 0\.001 -> 0\.002; train_layers: 'blocks' -> 'all'\."
    ):
        train(recipe_of(learning_rate=2e-3, train_layers="all"), run, resume=True, progress=False)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "fbqat", replace(METHODS["fbqat"], optimizer=Optimizer(ewgs=0.05)))
        with pytest.raises(
            ValueError,
            match=r"another recipe, .*: optimizer\.ewgs: 0\.0 -> 0\.05\.",
        ):
            train(recipe_of(), run, resume=True, progress=False)
    assert files_of(run) == before


def test_a_run_that_did_not_record_what_its_method_meant_is_not_continued(recipe_of, run_folder: Path, tmp_path: Path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    fields = yaml.safe_load((run / "recipe.yaml").read_text())
    del fields["recipe_version"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match=r"saved by an older version of fbqat_hub, .*Give another --output"):
        train(recipe_of(), run, resume=True, progress=False)


def test_a_run_of_a_newer_version_is_not_continued(recipe_of, run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    fields = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**fields, "recipe_version": 99}))
    with pytest.raises(ValueError, match=r"recipe_version 99; .*Update with"):
        train(recipe_of(), run, resume=True, progress=False)


@pytest.mark.parametrize("content", ["a: [1", "", "- 1", None])
def test_a_checkpoint_whose_recipe_is_damaged_is_not_used(content: str | None, tmp_path: Path, capsys) -> None:
    for step in (1, 2):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        save_file({}, folder / "state.safetensors")
        (folder / "recipe.yaml").write_text("steps: 4\n")
    file = tmp_path / "step-00000002" / "recipe.yaml"
    file.unlink() if content is None else file.write_text(content)
    assert checkpoint.newest_checkpoint(tmp_path, "steps: 4") == tmp_path / "step-00000001"
    assert f"{file} is damaged (" in capsys.readouterr().err
    assert not file.parent.exists()


@pytest.mark.parametrize("left", [1, 0], ids=["one before", "none before"])
def test_where_a_checkpoint_is_damaged_the_one_before_is_used(
    left: int, recipe_of, run_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    run, recipe = tmp_path / "run", recipe_of(save_every=1)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run, progress=False)
    states = sorted((run / "checkpoints").glob("*/state.safetensors"))
    assert len(states) == 2
    for state in states[left:]:
        state.write_bytes(state.read_bytes()[:-100])
    begun: list[int] = []
    load = checkpoint.load_checkpoint
    monkeypatch.setattr(loop, "load_checkpoint", lambda *given: begun.append(load(*given)) or begun[-1])
    train(recipe, run, resume=True, progress=False)
    assert begun == [2 * left]
    said = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert [line.partition(" is damaged")[0] for line in said] == [str(state) for state in reversed(states[left:])]
    one, other = tensors_of(run), tensors_of(run_folder)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("quantization", [{}, {"average_bits": 4.5}, {"activation_range": "static"}])
def test_what_is_resumed_is_not_calibrated_again(
    quantization: dict[str, Any], recipe_of, tmp_path: Path, monkeypatch
) -> None:
    run, recipe = tmp_path / "run", recipe_of(quantization=quantization, calibration={"samples": 4})
    straight = train(recipe, tmp_path / "straight", progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run, progress=False)
    for name in ("calibrate", "gptq_initialize", "chosen_widths"):
        monkeypatch.setattr(student, name, lambda *_, **__: pytest.fail("calibrated again"))
    same_run(train(recipe, run, resume=True, progress=False), straight)


def test_full_disk_leaves_no_half_checkpoint(recipe_of, run_folder: Path, tmp_path: Path, monkeypatch) -> None:
    run, write = tmp_path / "run", checkpoint.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if "00000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            train(recipe_of(), run, progress=False)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    same_run(train(recipe_of(), run, resume=True, progress=False), run_folder)


def test_full_disk_leaves_no_half_pipeline(recipe_of, run_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The pipeline cannot be written: the checkpoint stays, and a repeated command finishes the run."""
    run = tmp_path / "run"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.SanaTransformer2DModel.save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            train(recipe_of(), run, progress=False)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "recipe.yaml", "training_log.jsonl"]
    same_run(train(recipe_of(), run, resume=True, progress=False), run_folder)


def start(recipe: Path, run: Path, *, until: str) -> subprocess.Popen[str]:
    """``fbqat train`` in a process of its own, running, when ``until`` appears among the checkpoints."""
    command = [sys.executable, "-m", "fbqat_hub.cli", "train", str(recipe), "--output", str(run)]
    process = subprocess.Popen(
        command,
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore SIGINT, and their children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / until).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


# Enough steps that the signal comes in the middle, whatever the machine.
LONG = {"steps": 80, "save_every": 3, "learning_rate": 1e-4}


def test_killed_run_resumes_to_the_bit(recipe_of, recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL at a moment that nobody chose; resumed here; the same tensors and log as a run that nobody stopped."""
    fields = {**recipe_fields, **LONG}
    process = start(write_recipe(tmp_path / "recipe.yaml", fields), tmp_path / "killed", until="step-00000006")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model_index.json").exists()
    resumed = train(Recipe(**fields), tmp_path / "killed", resume=True, progress=False)
    same_run(resumed, train(Recipe(**fields), tmp_path / "whole", progress=False))


def test_ctrl_c_says_how_to_go_on(recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {**recipe_fields, **LONG}
    process = start(write_recipe(tmp_path / "recipe.yaml", fields), tmp_path / "run", until="step-00000003")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "fbqat: interrupted; " in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "run").rglob("*.partial"))
