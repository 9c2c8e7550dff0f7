"""The `fbqat` command: help with examples, errors of one line, the verbs from end to end."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fbqat_hub import __version__, cli
from tests.conftest import write_recipe

VERBS = ("demo", "train", "convert", "generate", "evaluate", "card", "export")


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
    example = help_of(capsys, verb).partition("example:")[2].strip()
    assert example.startswith(f"fbqat {verb} ")
    cli._parser().parse_args(shlex.split(example)[1:])


def test_version(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fbqat_hub {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sana-huge", "--output", "{tmp}/o"], "no recipe file 'sana-huge', .*; shipped: .*sana-tiny"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "stepz=5"], "'stepz' (did you mean 'steps'?)"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "learning_rate=fast"], "learning_rate is 'fast'"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "schedule={preset"], "schedule: '{preset' is not YAML"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "teacher={tmp}/t"], "{tmp}/t is no folder"),
        (["train", "sana-tiny", "--output", "{tmp}/o", "--set", "steps"], "--set takes KEY=VALUE, got 'steps'"),
        (["train", "{tmp}/broken.yaml", "--output", "{tmp}/o"], "recipe broken.yaml is not YAML"),
        (["train", "sana-tiny", "--output", "{tmp}"], "{tmp} exists and is not empty; give another --output"),
        (["convert", "{tmp}", "--output", "{tmp}/o"], "{tmp} is not a diffusers pipeline: it has no model_index.json"),
        (["convert", "{tmp}/missing", "--output", "{tmp}/o"], "{tmp}/missing is no folder"),
        (["generate", "{tmp}"], "no prompt"),
        (["generate", "{tmp}", ""], "no prompt, or an empty one"),
        (["generate", "{tmp}", "--prompts", "{tmp}/empty.txt"], "no prompt"),
        (["generate", "{tmp}", "--prompts", "{tmp}/missing.txt"], "No such file or directory: '{tmp}/missing.txt'"),
        (["generate", "{tmp}", "red", "--output", "{tmp}/o.png"], "{tmp} is not a diffusers pipeline"),
        (["evaluate", "{tmp}"], "no recipe file '{tmp}/recipe.yaml'"),
        (["card", "{tmp}"], "recipe.yaml"),
        (["export", "{tmp}"], "recipe.yaml"),
    ],
)
def test_error_is_one_line_that_names_the_thing(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.yaml").write_text("name: [x\nfamily: sana\n")
    (tmp_path / "empty.txt").write_text("\n  \n")
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
        (ValueError("two\n  lines"), 1, "error: two lines$"),
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


def test_convert(tiny_sana: Path, tmp_path: Path, capsys) -> None:
    status, out, _ = run(
        capsys, "convert", tiny_sana, "--output", tmp_path / "o", "--clip", "max_abs", "--leave", "*.attn2.*"
    )
    assert status == 0
    assert out.startswith(f"saved {tmp_path}/o. ")
    assert "method: ptq-maxabs" in (tmp_path / "o" / "recipe.yaml").read_text()
    assert "attn2" in (tmp_path / "o" / "transformer" / "config.json").read_text()
