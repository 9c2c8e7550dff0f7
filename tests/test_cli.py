"""The `fbqat` command: help with examples, errors of one line, the verbs from end to end."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fbqat_hub import __version__, cli
from fbqat_hub.cli.parser import parser
from tests.conftest import write_recipe

VERBS = (
    "demo",
    "train",
    "plan",
    "convert",
    "generate",
    "evaluate",
    "compare",
    "card",
    "export",
    "doctor",
    "lora",
    "publish",
    "pull",
    "list",
    "space",
)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit status, standard output, and standard error without progress bars."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, "\n".join(line for line in err.splitlines() if "it/s]" not in line and "?it/s" not in line)


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_verb_with_examples(capsys) -> None:
    text = help_of(capsys)
    for verb in VERBS:
        assert re.search(rf"^    {verb} ", text, re.MULTILINE), verb
        assert f"fbqat {verb} " in text.partition("examples:")[2], verb


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_that_parses(verb: str, capsys) -> None:
    """Or several, each with what it is for behind it."""
    for example in re.split(r"\nexamples?:\n", help_of(capsys, verb))[1].strip().splitlines():
        command = re.split(r" {3,}", example.strip())[0]
        assert command.startswith(f"fbqat {verb} ")
        parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize(
    "given",
    [
        ["sana", "red heart", "blue", "--seed", "3"],
        ["--seed", "3", "sana", "red heart", "blue"],
        ["sana", "--seed", "3", "red heart", "blue"],
        ["sana", "red heart", "--seed", "3", "--", "blue"],
    ],
)
def test_prompts_stand_before_or_after_options(given: list[str]) -> None:
    options = parser().parse_args(["generate", *given])
    assert (options.model, options.prompt, options.seed) == ("sana", ["red heart", "blue"], 3)


def test_a_prompt_may_begin_with_a_dash() -> None:
    assert parser().parse_args(["generate", "sana", "--seed", "3", "--", "-5 degrees"]).prompt == ["-5 degrees"]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        (
            "--gpus",
            "nonsense",
            "'nonsense' is not a number of GPUs and the memory of each; write e.g. 1x24GB or 8x80GB.",
        ),
        ("--seconds-per-step", "0", "'0' is no number of seconds above 0, at most 86400 (a day)."),
        ("--seconds-per-step", "1e300", "'1e300' is no number of seconds above 0, at most 86400 (a day)."),
    ],
)
def test_what_a_plan_cannot_read(option: str, value: str, says: str, capsys) -> None:
    status, _, err = run(capsys, "plan", "sana-tiny", option, value)
    assert status == 2
    assert err == f"fbqat: error: argument {option}: {says} (see fbqat plan --help)"


def test_version(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fbqat_hub {__version__}\n"


def test_an_option_of_export_is_not_one_of_convert(capsys) -> None:
    status, _, err = run(capsys, "convert", "runs/tiny", "--output", "out", "--to", "sdnq")
    assert status == 2
    assert "unrecognized arguments: --to sdnq; a packed model is written in another format by fbqat export --to" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sana-huge", "--output", "{tmp}/o"], "no recipe file 'sana-huge', .*; shipped: .*sana-tiny"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "stepz=5"], "'stepz' (did you mean 'steps'?)"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "learning_rate=fast"], "learning_rate is 'fast'"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "schedule={preset"], "schedule: '{preset' is not YAML"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "teacher={tmp}/t"], "{tmp}/t is no folder"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "steps"], "--set takes KEY=VALUE, got 'steps'"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "steps=010"], "--set steps: 010 is 8 to YAML"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "seed=12:30"], "--set seed: 12:30 is 750 to YAML"),
        (["plan", "sana-tiny", "--set", f"steps={10**29}", "--seconds-per-step", "1"], "at most 10000000"),
        (["train", "{tmp}/broken.yaml", "--output", "{tmp}/o"], "{tmp}/broken.yaml is not YAML"),
        (["train", "sana-tiny", "--output", "{tmp}"], "{tmp} exists and is not empty; give another --output"),
        (["plan", "sana-tiny", "--set", "method=ptq-mse"], "method ptq-mse does not train, so there is nothing"),
        (["plan", "sana-tiny", "--measure", "--set", "method=ptq-mse"], "method ptq-mse does not train, so there is"),
        (["plan", "sana-tiny", "--output", "{tmp}/o"], "--output keeps what --measure measures"),
        (["plan", "sana-tiny", "--measure", "--gpus", "1x24GB"], "--gpus is for what is computed without weights"),
        (["doctor", "{tmp}/bundles"], "holds a bundle for each chip; give one of them, e.g. {tmp}/bundles/sm8650"),
        (["convert", "{tmp}", "--output", "{tmp}/o"], "{tmp} is not a diffusers pipeline: it has no model_index.json"),
        (["convert", "{tmp}/missing", "--output", "{tmp}/o"], "{tmp}/missing is no folder"),
        (["generate", "{tmp}"], "no prompt"),
        (["generate", "{tmp}", ""], "no prompt, or an empty one"),
        (
            ["generate", "{tmp}", "--prompts", "{tmp}/empty.txt"],
            "{tmp}/empty.txt is empty; write one prompt on each line",
        ),
        (["generate", "{tmp}", "--prompts", "{tmp}/missing.txt"], "there is no file {tmp}/missing.txt"),
        (["generate", "{tmp}", "red", "--output", "{tmp}/o.png"], "{tmp} is not a diffusers pipeline"),
        (["evaluate", "{tmp}"], "{tmp} has no recipe.yaml; give the folder of a run"),
        (["compare", "{tmp}", "{tmp}/missing"], "{tmp} holds no pictures"),
        (["compare", "{tmp}/broken.yaml", "{tmp}"], "{tmp}/broken.yaml is not a folder; give a folder of pictures"),
        (["compare", "{tmp}", "{tmp}", "--metrics", "fidd"], "unknown metrics fidd; known: psnr, ssim"),
        (["generate", "{tmp}/missing", "red"], "{tmp}/missing is no folder"),
        (["card", "{tmp}"], "recipe.yaml"),
        (["export", "{tmp}"], "{tmp} is not a diffusers pipeline"),
        (["export", "{tmp}/missing"], "{tmp}/missing is no folder, nor a Hub id"),
        (["card", "{tmp}", "--repo", "a b/c"], "--repo a b/c: "),
        (["publish", "{tmp}/missing", "--repo", "me/x"], "{tmp}/missing is no folder; give the folder of a run"),
        (["pull", "me/x@w6", "--revision", "w8"], "me/x@w6 names revision w6, and --revision w8; give one of them"),
        (["pull", "{tmp}", "--verify"], "{tmp} has no fbqat.json, so what belongs into it is not known"),
    ],
)
def test_error_is_one_line_that_names_the_thing(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.yaml").write_text("name: [x\nfamily: sana\n")
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "bundles" / "sm8650").mkdir(parents=True)
    (tmp_path / "bundles" / "sm8650" / "manifest.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert status == 1
    assert out == ""
    assert err.startswith("fbqat: error: ")
    assert err.count("\n") == 0
    expected = re.escape(message).replace(r"\.\*", ".*").replace(re.escape("{tmp}"), re.escape(str(tmp_path)))
    assert re.search(expected, err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_traceback_on_request(capsys) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "train", "sana-huge", "--output", "o"])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "fbqat: interrupted; .* --resume"),
        (OSError(28, "No space left on device"), 1, "No space left on device Free some space, .* --resume"),
        (RuntimeError("Error while serializing: I/O error: no space (os error 28)"), 1, "Free some space"),
        (ValueError("two\n  lines"), 1, "error: .*two lines$"),
    ],
)
def test_what_can_happen_in_the_middle(error, status: int, message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("fbqat_hub.training.distill.train", stop)
    code, _, err = run(capsys, "train", "sana-tiny", "--output", tmp_path / "o")
    assert code == status
    assert re.search(message, err), err


def test_train_then_generate(recipe_fields: dict[str, Any], tmp_path: Path, capsys) -> None:
    """The recipe from a file with changes, a packed pipeline, and a picture of the recipe's size from it."""
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_fields)
    status, out, err = run(
        capsys, "train", recipe, "--output", tmp_path / "run", "--set", "steps=2", "learning_rate=1e-4"
    )
    assert (status, "error" in err) == (0, False)
    assert out == f"saved {tmp_path}/run. Next: fbqat evaluate {tmp_path}/run ; fbqat card {tmp_path}/run\n"
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in log] == pytest.approx([0.5e-4, 0.5e-4])  # warm-up 1/2, cosine at 1/2

    (tmp_path / "prompts.txt").write_text("dark red\n\nsky\n")
    for name in ("a.png", "b.png"):
        status, _, _ = run(
            capsys, "generate", tmp_path / "run", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / name
        )
        assert status == 0
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    status, out, _ = run(capsys, "generate", tmp_path / "run", "red", "--output", tmp_path / "c.png", "--seed", 5)
    assert (status, out) == (0, f"saved {tmp_path}/c.png\n")
    assert Image.open(tmp_path / "c.png").size == (32, 32)


def test_plan(recipe_fields: dict[str, Any], tmp_path: Path, capsys) -> None:
    """With the one validation picture of this data nothing is sure, so all layers are advised."""
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_fields)
    status, out, err = run(capsys, "plan", recipe, "--measure", "--output", tmp_path / "o", "--set", "steps=2")
    assert (status, "error" in err) == (0, False)
    assert re.search(r"^4 +0\.\d{5} +–$", out, re.MULTILINE)
    assert "\nAdvice: train all: of no smaller group is it sure" in out
    assert "\nTime: 2 steps of " in out
    assert out.endswith(f"saved {tmp_path}/o\n")
    assert json.loads((tmp_path / "o" / "plan.json").read_text())["recipe"]["steps"] == 2


def test_plan_without_weights(recipe_fields: dict[str, Any], tmp_path: Path, capsys, monkeypatch) -> None:
    """Of a teacher whose weights are gone, and without the warnings of models that are only counted."""
    from transformers.utils.logging import get_verbosity

    from fbqat_hub.training import costs_report

    folder = shutil.copytree(recipe_fields["teacher"], tmp_path / "teacher")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_fields | {"teacher": str(folder)})
    said: list[int] = []
    monkeypatch.setattr(
        costs_report, "gib", lambda size, plain=costs_report.gib: said.append(get_verbosity()) or plain(size)
    )
    status, out, err = run(capsys, "plan", recipe, "--gpus", "1x1GB", "--seconds-per-step", "2", "--set", "steps=30")
    assert (status, err) == (0, "")
    assert set(said) == {logging.CRITICAL}
    assert "\nMemory of each device, 4 of 4 samples of a step at a time, 32 x 32:\n" in out
    assert "\nlatents of 12 pictures" in out
    assert "\nTime: 30 steps of 2 s are 0:01:00" in out
    assert "\n1x1GB: it does not fit" in out  # 1 GiB is kept free


def test_convert(tiny_sana: Path, tmp_path: Path, capsys) -> None:
    status, out, _ = run(
        capsys, "convert", tiny_sana, "--output", tmp_path / "o", "--clip", "max_abs", "--leave", "*.attn2.*"
    )
    assert status == 0
    assert out.startswith(f"saved {tmp_path}/o. ")
    assert "method: ptq-maxabs" in (tmp_path / "o" / "recipe.yaml").read_text()
    assert "attn2" in (tmp_path / "o" / "transformer" / "config.json").read_text()


def test_evaluate_then_compare(run_folder: Path, tmp_path: Path, capsys) -> None:
    """A run measured from the command line; its pictures against themselves, in a table, a file and a sheet."""
    shutil.copytree(run_folder, tmp_path / "run")
    status, out, err = run(
        capsys, "evaluate", tmp_path / "run", "--prompts", "openmoji", "--images", 3, "--metrics", "psnr", "fd_teacher"
    )
    assert status == 0
    assert "3 prompts of openmoji; choose others with --prompts" in err
    assert re.search(r"^psnr +[\d.]+ dB  95% interval [\d.]+ to [\d.]+  \(n = 3\)$", out, re.MULTILINE), out
    assert re.search(r"^fd_teacher +[\d.e-]+  \(n = 3\)$", out, re.MULTILINE), out

    folders = (tmp_path / "run", tmp_path / "run" / "images" / "samples")
    status, out, _ = run(capsys, "compare", *folders, "--metrics", "ssim", "--output", tmp_path / "compared")
    assert status == 0
    assert out.splitlines()[1].split() == ["ssim", "↑", "a", "to", "b", "1", "1", "to", "1", "3"]
    assert json.loads((tmp_path / "compared" / "comparison.json").read_text())["metrics"][0]["value"] == 1
    assert Image.open(tmp_path / "compared" / "comparison.png").width > 300


def test_convert_takes_a_variant_and_prints_a_command_that_can_be_pasted(
    half_sana: Path, tmp_path: Path, capsys
) -> None:
    source = shutil.copytree(half_sana, tmp_path / "my model")
    for path in source.glob("*/*.safetensors"):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
        path.write_bytes(b"another variant, damaged")
    output = tmp_path / "my model w4a8"
    assert run(capsys, "convert", source, "--output", output)[0] == 1
    status, out, _ = run(capsys, "convert", source, "--output", output, "--variant", "fp16")
    assert status == 0
    command = shlex.split(out.partition("fbqat evaluate")[2])
    assert command[0] == str(output)
