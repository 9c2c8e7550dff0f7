"""``fbqat lora`` on the tiny Sana: training an adapter, and its passport, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.fine_tune import in_style
from fbqat_hub import cli
from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.lora_check import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, adapter_file, check, load_adapter
from fbqat_hub.training.lora_train import train
from fbqat_hub.training.openmoji import load_openmoji
from fbqat_hub.training.ptq import Calibrated, convert_pipeline
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.teachers import resolve_teacher
from tests.conftest import call_of


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main(["lora", *(str(argument) for argument in arguments)])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def adapter(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, made on the float model, in diffusers' layout; not to be written to."""
    pipeline, folder = load_pipeline(tiny_sana), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "conv_point"], init_lora_weights=False)
    tensors = get_peft_model_state_dict(get_peft_model(pipeline.transformer, config))
    layers = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def edited(adapter: Path, folder: Path, edit: Any) -> Path:
    tensors = {name: value.clone() for name, value in load_file(adapter / DIFFUSERS_FILE).items()}
    save_file(edit(tensors), folder / DIFFUSERS_FILE)
    return folder


def test_passport_of_an_adapter(adapter, packed_folder, tiny_sana, tmp_path, capsys) -> None:
    output = tmp_path / "style.json"
    options = ("--base", packed_folder, "--float", tiny_sana, "--prompt", "red", "blue", "--output", output)
    status, out, err = run(capsys, "check", adapter, *options)
    assert status == 0, err
    found = json.loads(output.read_text())
    assert found["matched"] == len(load_file(adapter / DIFFUSERS_FILE))
    assert found["unmatched"] == []
    assert found["change"] > 1e-3
    assert found["cosine"] > 0.8
    assert found["norm_ratio"] == pytest.approx(1, abs=0.3)
    assert f"{found['cosine']:.4f}" in out
    with Image.open(output.with_suffix(".png")) as sheet:
        assert sheet.width > 4 * 144  # four columns


def test_the_passport_goes_into_the_card(adapter, packed_folder, tiny_sana, tmp_path, capsys) -> None:
    """Once, however often it is checked; nothing of this machine's paths; what was in the card stays."""
    folder = edited(adapter, tmp_path, lambda tensors: tensors)
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n\n# Mine\n\nAs I wrote it.\n")
    for prompts in ([], ["--prompt", "red"]):
        options = ("--base", packed_folder, "--float", tiny_sana, "--card", *prompts)
        status, out, err = run(capsys, "check", folder, *options)
        assert status == 0, err
        assert "README.md" in out
    card = (folder / "README.md").read_text()
    found = json.loads((folder / "lora-check.json").read_text())
    assert card.startswith("---\ntags: [lora]\n---\n\n# Mine\n\nAs I wrote it.\n")
    assert card.count("## Checked on the 4-bit base") == 1
    assert f"| tensors matched | {found['matched']} of {found['matched']} |" in card
    assert f"| cosine of changes | {found['cosine']:.4f} |" in card
    assert "](lora-check.png)" in card
    assert (folder / "lora-check.png").is_file()
    assert str(tmp_path) not in card + json.dumps(found)
    assert f"On `{packed_folder.name}`, and on `{tiny_sana.name}`" in card


def test_a_card_is_made_where_there_is_none(adapter, packed_folder, tmp_path) -> None:
    folder = edited(adapter, tmp_path, lambda tensors: tensors)
    check(str(folder / DIFFUSERS_FILE), str(packed_folder), card=True)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "change, 4-bit base" in card


def test_a_float_base_of_the_same_weights_has_the_same_change(adapter, tiny_sana, tmp_path) -> None:
    """Float activations on both sides."""
    packed = convert_pipeline(str(tiny_sana), tmp_path / "packed", {"activation_bits": 32, "module_overrides": {}})
    pipeline = load_pipeline(packed)
    pipeline.transformer.dequantize()
    pipeline.save_pretrained(tmp_path / "float")
    found = check(str(adapter / DIFFUSERS_FILE), str(packed), str(tmp_path / "float"))
    assert found.cosine == pytest.approx(1)
    assert found.norm_ratio == pytest.approx(1)
    assert check(str(adapter), str(packed), seed=1).change != found.change


def test_bases_in_each_others_place_are_refused(adapter, packed_folder, tiny_sana) -> None:
    """The passport would call one of them what it is not."""
    with pytest.raises(ValueError, match=f"{tiny_sana.name} is not quantized, and --base is the 4-bit pipeline"):
        check(str(adapter), str(tiny_sana), str(packed_folder))
    with pytest.raises(ValueError, match=f"{packed_folder.name} is quantized, and --float is the full-precision"):
        check(str(adapter), str(packed_folder), str(packed_folder))


def test_tensors_that_do_not_match_are_named(adapter, packed_folder, tmp_path) -> None:
    other = "transformer.blocks.9.nowhere.lora_{}.weight"
    extra = {other.format("A"): torch.ones(4, 16), other.format("B"): torch.ones(16, 4)}
    found = check(str(edited(adapter, tmp_path, lambda tensors: tensors | extra)), str(packed_folder))
    assert sorted(found.unmatched) == sorted(extra)
    assert found.matched == len(load_file(adapter / DIFFUSERS_FILE))
    assert "blocks.9.nowhere" in found.text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()},
            "the adapter changes nothing: all lora_B of",
        ),
        (lambda tensors: {f"transformer.x.{k[12:]}": v for k, v in tensors.items()}, "no tensor of the adapter"),
        (lambda tensors: {k: v * float("nan") for k, v in tensors.items()}, "not finite"),
    ],
)
def test_an_adapter_that_does_nothing_or_harm_is_an_error(
    edit, message, adapter, packed_folder, tmp_path, capsys
) -> None:
    status, out, err = run(capsys, "check", edited(adapter, tmp_path, edit), "--base", packed_folder)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_damaged_adapter_is_named_before_anything_is_loaded(tmp_path, capsys) -> None:
    file = tmp_path / "short.safetensors"
    file.write_bytes(b"123")
    status, _, err = run(capsys, "check", file, "--base", tmp_path / "not loaded")
    assert (status, err.count("\n")) == (1, 1)
    assert f"{file} is damaged or cut short" in err
    assert "Download" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nothing"], "is no file or folder, nor a Hub id"),
        (["{tmp}"], "it has no safetensors file"),
        (["{adapter}", "--prompt", "red"], "say where with --output"),
        (["{adapter}", "--output", "{tmp}/a.txt"], "must be a file that ends in .json"),
        (["someone/style", "--card"], "someone/style is not on this machine; download it"),
        (["{adapter}", "--card", "--prompt", "red", "--output", "{tmp}/a.json"], "leave --output out"),
    ],
)
def test_bad_input_is_one_line(arguments, message, adapter, packed_folder, tmp_path, capsys) -> None:
    given = [each.format(tmp=tmp_path, adapter=adapter) for each in arguments]
    status, _, err = run(capsys, "check", *given, "--base", packed_folder)
    assert status == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_training_lowers_the_held_out_loss_and_leaves_the_base(
    pictures, packed_folder, tiny_sana, tmp_path, capsys
) -> None:
    before = {file: file.read_bytes() for file in packed_folder.rglob("*.safetensors")}
    output = tmp_path / "style"
    options = ("--base", packed_folder, "--output", output, "--steps", 30, "--learning-rate", "1e-2", "--rank", 4)
    status, out, err = run(capsys, "train", pictures, *options)
    assert status == 0, err
    assert {file: file.read_bytes() for file in packed_folder.rglob("*.safetensors")} == before
    first, last = (float(word) for word in re.findall(r"(?:before|after) ([0-9.]+)", out))
    assert last < 0.98 * first
    card = (output / "README.md").read_text()
    assert f"held-out loss after | {last:.4g}" in card
    assert str(tmp_path.parent) not in card
    for base in (packed_folder, tiny_sana):
        matched, unmatched = load_adapter(load_pipeline(base), adapter_file(str(output)))
        assert matched == len(load_file(output / DIFFUSERS_FILE))
        assert unmatched == []
    assert check(str(output), str(packed_folder)).change > 1e-3
    status, _, err = run(capsys, "train", pictures, *options)
    assert status == 1
    assert "exists and is not empty" in err


def test_training_is_repeatable(pictures, packed_folder, tmp_path) -> None:
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(pictures, str(packed_folder), tmp_path / name, steps=2, seed=seed, progress=False)
        states.append((tmp_path / name / DIFFUSERS_FILE).read_bytes())
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["{tmp}/none"], "is no folder; give one of pictures"),
        (["{pictures}", "--learning-rate", "0"], "--learning-rate is 0.0"),
        (["{pictures}", "--learning-rate", "1e30", "--steps", "3"], "the loss is"),
    ],
)
def test_training_that_cannot_be_leaves_nothing(change, message, pictures, packed_folder, tmp_path, capsys) -> None:
    given = [each.format(tmp=tmp_path, pictures=pictures) for each in change]
    status, _, err = run(capsys, "train", *given, "--base", packed_folder, "--output", tmp_path / "o")
    assert status == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def peft_adapter(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    config = LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    get_peft_model(load_pipeline(tiny_sana).transformer, config).save_pretrained(folder)
    return folder


SIDE = "base_model.model.transformer_blocks.1.attn2.to_k.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != SIDE}, "half of a low-rank pair of .*attn2.to_k; it is damaged"),
        (lambda t: t | {SIDE: t[SIDE][:2]}, "has two ranks in .*attn2.to_k: 2 of lora_A and 4 of lora_B"),
        (lambda t: {n: v[:2] if "lora_A" in n else v[:, :2] for n, v in t.items()}, "does not fit this Sana.*mismatch"),
        (lambda t: t | {SIDE: torch.ones(4, 32)}, "does not fit this SanaTransformer2DModel: .*size mismatch"),
    ],
    ids=["half", "two-ranks", "another-rank", "another-size"],
)
def test_a_damaged_adapter_of_peft_is_told_from_a_fault(
    edit, message, peft_adapter, packed_folder, tmp_path, capsys
) -> None:
    (tmp_path / PEFT_CONFIG).write_bytes((peft_adapter / PEFT_CONFIG).read_bytes())
    tensors = {name: value.contiguous() for name, value in edit(load_file(peft_adapter / PEFT_FILE)).items()}
    save_file(tensors, tmp_path / PEFT_FILE)
    status, _, err = run(capsys, "check", tmp_path, "--base", packed_folder)
    assert status == 1
    assert re.search(f"fbqat: error: .*{PEFT_FILE} .*{message}", err)
    assert "fault in fbqat_hub" not in err


@pytest.mark.parametrize(("text", "message"), [("[]", "has peft_type None; it must be"), ("{", "is not JSON")])
def test_a_broken_configuration_of_peft_is_named(text, message, peft_adapter, packed_folder, tmp_path, capsys) -> None:
    (tmp_path / PEFT_FILE).write_bytes((peft_adapter / PEFT_FILE).read_bytes())
    (tmp_path / PEFT_CONFIG).write_text(text)
    status, _, err = run(capsys, "check", tmp_path, "--base", packed_folder)
    assert status == 1
    assert f"fbqat: error: {tmp_path / PEFT_CONFIG} {message}" in err


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_half_an_adapter_is_not_called_whole(side, adapter, packed_folder, tmp_path, capsys) -> None:
    def without_one(tensors: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in tensors if side in name)
        return {other: value for other, value in tensors.items() if other != name}

    status, _, err = run(capsys, "check", edited(adapter, tmp_path, without_one), "--base", packed_folder)
    assert status == 1
    assert "has half of a low-rank pair of transformer.transformer_blocks" in err


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "sana"])
def test_training_and_check_of_the_other_families(family, teacher_of, pictures, tmp_path) -> None:
    packed = convert_pipeline(str(teacher_of(family)), tmp_path / "packed")
    pipeline = load_pipeline(packed)
    call = call_of(family, pipeline)  # FLUX's own size is 1024
    load_recipe(packed / "recipe.yaml", generation=call).save(packed / "recipe.yaml")
    done = train(pictures, str(packed), tmp_path / "style", steps=20, learning_rate=1e-2, progress=False)
    assert done.loss_after < done.loss_before
    names = [f".{name}" for name in load_file(adapter_file(str(done.output)))]
    blocks = FAMILIES[family].blocks(pipeline.transformer)
    assert [block for block in blocks if not any(f".{block}." in name for name in names)] == []
    found = check(str(done.output), str(packed), str(teacher_of(family)))
    assert found.unmatched == []
    assert found.cosine > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana-tiny", "pixart-sigma-tiny", "sd3-tiny", "flux-schnell-tiny"])
def test_an_adapter_of_the_float_base_does_the_same_on_4_bits(name: str, tmp_path: Path) -> None:
    """A trained teacher, an adapter trained on it in float, and the bits that recipes ship with."""
    teacher = str(resolve_teacher(load_recipe(name).teacher))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    data = load_openmoji(64, ["Food & Drink"])["train"].select(range(32))
    for number, row in enumerate(data):
        in_style(row["image"]).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(row["caption"], encoding="utf-8")
    train(pictures, teacher, tmp_path / "style", steps=60, progress=False)
    prompts = data["caption"][:8]
    convert_pipeline(
        teacher, tmp_path / "w4.5", {"average_bits": 4.5}, gptq=Calibrated(prompts=prompts, samples=64), progress=False
    )
    found = check(str(tmp_path / "style"), str(tmp_path / "w4.5"), teacher)
    assert found.unmatched == []
    assert found.float_change > 0.01
    assert found.cosine > 0.95
    assert found.norm_ratio == pytest.approx(1, abs=0.1)
