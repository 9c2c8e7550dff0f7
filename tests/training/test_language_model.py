"""A tiny Gemma-2, trained on text, through prepare, training and conversion (arXiv 2510.14823, appendix B)."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fbqat_hub  # noqa: F401  # makes transformers know the format
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training import language_model
from fbqat_hub.training.language_model import Distillation, encode, held_out_divergence, joined, quantize, started
from fbqat_hub.training.method import METHODS, Quantization
from fbqat_hub.training.teachers import SHIPPED
from fbqat_hub.training.tokenizers import train_tokenizer

_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
LINEAR = 14  # layers of the two blocks; the head is tied to the embedding


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Sentences in which what comes depends on what came: each colour has its animal, each animal its place."""
    colours, animals, places = (
        ("red", "dark", "white", "green"),
        ("cat", "bear", "swan", "frog"),
        ("bed", "den", "lake", "pond"),
    )
    lines = []
    for turn in range(160):
        first, second = turn % 4, (turn // 4) % 4
        lines.append(
            f"the {colours[first]} {animals[first]} and the {colours[second]} {animals[second]} are in the "
            f"{places[first]} and in the {places[second]}"
        )
    return lines


@pytest.fixture(scope="module")
def gemma(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Gemma-2 that knows these sentences."""
    folder = tmp_path_factory.mktemp("gemma") / "float"
    tokenizer = train_tokenizer("GemmaTokenizer", texts, 256, 16)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(vocab_size=len(tokenizer), **_CONFIG)
    model = transformers.Gemma2ForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    examples = encode(tokenizer, texts, 16)
    for step in range(80):
        batch = joined([examples[(16 * step + each) % len(examples)] for each in range(16)])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def divergence_of(folder: Path, gemma: Path, texts: list[str]) -> float:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    models = [transformers.AutoModelForCausalLM.from_pretrained(each).eval() for each in (folder, gemma)]
    return held_out_divergence(*models, encode(tokenizer, texts, 256)[:: language_model.HELD_OUT])


def test_training_takes_off_what_gptq_leaves_and_what_is_saved_is_what_was_trained(
    gemma: Path, texts: list[str], tmp_path: Path
) -> None:
    how = Distillation(steps=40, learning_rate=5e-3)
    before, after = quantize(str(gemma), texts, tmp_path / "out", how, device="cpu", shown=False)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(gemma)
    examples = encode(transformers.AutoTokenizer.from_pretrained(gemma), texts, 256)
    nearest = held_out_divergence(started(teacher, METHODS["ptq-mse"], examples), teacher, examples[::10])
    assert after < 0.5 * before < 0.25 * nearest

    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = dict(named_layers(packed, PackedLayer))
    assert len(layers) == LINEAR
    assert {layer.weight_bits for layer in layers.values()} == {4}
    assert type(packed.lm_head) is nn.Linear
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert divergence_of(tmp_path / "out", gemma, texts) == pytest.approx(after, rel=1e-2)


def test_the_published_widths_end_at_four_bits_and_the_same_seed_gives_the_same_codes(
    gemma: Path, texts: list[str], tmp_path: Path
) -> None:
    how = Distillation(method=METHODS["fbqat-paper"], steps=25, learning_rate=1e-3)
    made = []
    for name in ("a", "b"):
        quantize(str(gemma), texts[:60], tmp_path / name, how, device="cpu", shown=False)
        made.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    assert sum(name.endswith("weight_packed") for name in made[0]) == LINEAR


def test_padding_changes_nothing(gemma: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma)
    model = transformers.AutoModelForCausalLM.from_pretrained(gemma)
    examples = encode(tokenizer, ["red heart", "face with tears of joy and a long name"], 16)
    student = started(model, METHODS["ptq-mse"], examples)
    counts = [int(each["attention_mask"].sum()) for each in examples]
    alone = [language_model.divergence(student, model, each).item() for each in examples]
    together = language_model.divergence(student, model, joined(examples)).item()
    mean = sum(count * loss for count, loss in zip(counts, alone, strict=True)) / sum(counts)
    assert together == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (["red heart"] * 9, {}, "there are 9 lines of two tokens and more; give at least 10"),
        (
            ["red heart"] * 10,
            {"quantization": Quantization(average_bits=4.5)},
            "average_bits and static ranges are for",
        ),
        (["red heart"] * 10, {"quantization": Quantization(activation_range="static")}, "are for denoisers"),
    ],
)
def test_what_is_wrong_leaves_nothing(
    lines: list[str], changes: dict[str, Any], message: str, gemma: Path, tmp_path: Path
) -> None:
    how = Distillation(method=replace(METHODS["fbqat"], **changes), steps=1)
    with pytest.raises(ValueError, match=message):
        quantize(str(gemma), lines, tmp_path / "out", how, device="cpu", shown=False)
    assert not (tmp_path / "out").exists()


def test_what_is_no_language_model_is_refused(gemma: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gemma, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    for source, message in (
        (folder, "model has no tokenizer: none of tokenizer.json"),  # transformers would make an empty one up
        (SHIPPED["fbqat-hub/sana-tiny-openmoji"], "is a diffusers pipeline; give the folder of a language model"),
        (tmp_path, "has no config: none of config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(str(source), ["a b"] * 10, tmp_path / "out", Distillation())
    with pytest.raises(FileNotFoundError, match="nosuch/ is no folder, nor a Hub id"):
        quantize("nosuch/", ["a b"] * 10, tmp_path / "out", Distillation())
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_it(gemma: Path, texts: list[str], tmp_path: Path) -> None:
    how = Distillation(steps=5, learning_rate=math.inf)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2; lower --learning-rate"):
        quantize(str(gemma), texts, tmp_path / "out", how, device="cpu", shown=False)
    assert not (tmp_path / "out").exists()


def test_command(gemma: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(texts[:40]))
    output = tmp_path / "out"
    command = [str(gemma), "--texts", str(tmp_path / "lines.txt"), "--output", str(output), "--device", "cpu"]
    language_model.main([*command, "--steps", "3", "--tokens", "8"])
    assert f"saved {output}; held-out divergence" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*out exists and is not empty"):
        language_model.main(command)
    with pytest.raises(SystemExit):
        language_model.main([*command, "--steps", "0"])
    assert "--steps is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .*nosuch\.txt"):
        language_model.main([str(gemma), "--texts", "nosuch.txt", "--output", str(tmp_path / "other")])
