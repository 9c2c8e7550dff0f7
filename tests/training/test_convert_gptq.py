"""`fbqat convert --method gptq`, block by block, against the whole model at once."""

from __future__ import annotations

import inspect
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

from fbqat_hub.cli import main
from fbqat_hub.families import FAMILIES
from fbqat_hub.integrations.checkpoint import targets_of
from fbqat_hub.pipelines import load_pipeline, save_pipeline
from fbqat_hub.quantization import PackedLayer, convert, gptq_initialize, named_layers
from fbqat_hub.quantization.convert import prepare_layers
from fbqat_hub.quantization.sensitivity import output_sensitivity, rounding_errors
from fbqat_hub.quantization.widths import widths_of_average
from fbqat_hub.training import ptq
from fbqat_hub.training.distill import train
from fbqat_hub.training.ptq import Calibrated, convert_pipeline
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.seeding import generator
from fbqat_hub.weights import TensorFile
from tests.conftest import CALL, CAPTIONS, call_of, edit_tensors, subprocess_environment, weights_of
from tests.test_components import as_variant

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
PROMPTS = CAPTIONS[:3]
SANA_FIRST = [name if name == "sana" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def whole_pipeline(folder: Path) -> Any:
    """In float32, in memory of its own: a product's last bits depend on where in memory its factors begin."""
    pipeline = load_pipeline(folder, torch.float32)
    for parameter in pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def asked_of(pipeline: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
    """What the denoiser is called with for `PROMPTS`, one after the other, all of two steps."""
    denoiser, found = pipeline.transformer, []
    parameters = inspect.signature(denoiser.forward)
    hook = denoiser.register_forward_pre_hook(
        lambda _, positional, named: found.append(dict(parameters.bind(*positional, **named).arguments)),
        with_kwargs=True,
    )
    for index, prompt in enumerate(PROMPTS):
        numbers = generator("calibration picture", prompt, index)
        torch.rand(2, generator=numbers)  # which steps are kept
        pipeline(prompt=prompt, generator=numbers, output_type="latent", **call)
    hook.remove()
    return found


@pytest.mark.parametrize("family", SANA_FIRST)
def test_equals_the_whole_model(
    family: str, teacher_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sampled, inputs = teacher_of(family), ptq.sampled_inputs, []

    def recorded(*args: Any, **options: Any) -> Any:
        inputs.extend(sampled(*args, **options))
        return inputs

    monkeypatch.setattr(ptq, "sampled_inputs", recorded)
    pipeline = whole_pipeline(folder)
    call = {**FAMILIES[family].own_call(pipeline), **call_of(family, pipeline)}
    made = convert_pipeline(
        str(folder), tmp_path / "out", gptq=Calibrated(prompts=PROMPTS, samples=6, device="cpu"), call=call
    )
    wanted = asked_of(pipeline, call)
    assert len(inputs) == len(wanted) >= 6
    for ours, theirs in zip(map(tree_leaves, inputs), map(tree_leaves, wanted), strict=True):
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs, strict=True))

    model = pipeline.transformer
    config = load_recipe(made / "recipe.yaml").config()
    prepare_layers(model, targets_of(model, config), config.weight_scheme())
    gptq_initialize(model, lambda: wanted)
    convert(model)
    packed = load_file(made / WEIGHTS)
    layers = dict(named_layers(model, PackedLayer))
    assert {f"{name}.weight_packed" for name in layers} == {name for name in packed if name.endswith("_packed")}
    for name, layer in layers.items():
        assert torch.equal(packed[f"{name}.weight_packed"], layer.weight_packed), name
        assert torch.equal(packed[f"{name}.weight_scale"], layer.weight_scale), name
    load_pipeline(made)


def test_codes_are_not_the_nearest_ones_and_the_recipe_says_how(tiny_sana: Path, tmp_path: Path) -> None:
    gptq = Calibrated(prompts=CAPTIONS, samples=4, device="cpu")
    made = convert_pipeline(str(tiny_sana), tmp_path / "out", gptq=gptq, call=CALL)
    nearest = convert_pipeline(str(tiny_sana), tmp_path / "nearest")
    left, right = load_file(made / WEIGHTS), load_file(nearest / WEIGHTS)
    assert {name: (each.dtype, each.shape) for name, each in left.items()} == {
        name: (each.dtype, each.shape) for name, each in right.items()
    }
    differing = {name.rpartition(".")[2] for name in left if not torch.equal(left[name], right[name])}
    assert differing == {"weight_packed"}
    recipe = load_recipe(made / "recipe.yaml")
    assert (recipe.method, recipe.calibration_prompts, recipe.gptq.samples) == ("ptq-gptq", 4, 4)
    assert recipe.generation["max_sequence_length"] == CALL["max_sequence_length"]
    with pytest.raises(ValueError, match="calibration_prompts is 4: the codes are those of fbqat convert"):
        train(recipe, tmp_path / "again")


def test_half_precision_and_a_variant(half_sana: Path, tmp_path: Path) -> None:
    """Computed in float32, whatever the files hold."""
    save_pipeline(load_pipeline(half_sana, torch.float32), tmp_path / "float")
    as_variant(shutil.copytree(half_sana, tmp_path / "variant"), "fp16")
    gptq = Calibrated(prompts=PROMPTS, samples=3, device="cpu")
    wanted = load_file(convert_pipeline(str(tmp_path / "float"), tmp_path / "a", gptq=gptq, call=CALL) / WEIGHTS)
    for number, (source, variant) in enumerate(((half_sana, None), (tmp_path / "variant", "fp16"))):
        made = load_file(
            convert_pipeline(str(source), tmp_path / str(number), variant=variant, gptq=gptq, call=CALL) / WEIGHTS
        )
        packed = [name for name in wanted if name.endswith(("weight_packed", "weight_scale"))]
        assert [name for name in packed if not torch.equal(made[name], wanted[name])] == []
        assert made["scale_shift_table"].dtype == torch.float16


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_stopped_in_a_block_leaves_nothing(error: BaseException, tiny_sana: Path, tmp_path: Path, monkeypatch) -> None:
    write, output = TensorFile.write, tmp_path / "out"

    def stop(file: TensorFile, name: str, values: torch.Tensor) -> None:
        if name.startswith("transformer_blocks.1."):
            raise error
        write(file, name, values)

    monkeypatch.setattr(TensorFile, "write", stop)
    with pytest.raises(type(error)):
        convert_pipeline(str(tiny_sana), output, gptq=Calibrated(prompts=["red"], samples=1, device="cpu"), call=CALL)
    assert not output.exists()


def test_only_the_block_that_runs_has_numbers(tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, load = [], ptq.StreamedDenoiser.block

    def watched(streamed: Any, name: str) -> nn.Module:
        blocks = [streamed._empty[each] for each in streamed.names]
        seen.append({tensor.device.type for block in blocks for tensor in block.parameters()})
        return load(streamed, name)

    monkeypatch.setattr(ptq.StreamedDenoiser, "block", watched)
    convert_pipeline(str(tiny_sana), tmp_path / "out", gptq=Calibrated(prompts=["red"], samples=1), call=CALL)
    assert len(seen) == 2 * 2 + 2  # two steps of the sampler, and GPTQ
    assert all(devices == {"meta"} for devices in seen)


KILLED = """
import os, sys
from pathlib import Path
from fbqat_hub.training.ptq import Calibrated, convert_pipeline
from fbqat_hub.weights import TensorFile
from tests.conftest import CALL

write, left = TensorFile.write, [int(sys.argv[3])]

def killed(*given):
    if not left[0]:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    write(*given)

TensorFile.write = killed
gptq = Calibrated(prompts=["red", "green"], samples=2, device="cpu")
convert_pipeline(sys.argv[1], Path(sys.argv[2]), {"average_bits": 4.5}, gptq=gptq, call=CALL, progress=False)
"""


@pytest.mark.slow
def test_killed_anywhere_it_is_whole_or_not_there_and_a_second_run_is_the_same(tiny_sana: Path, tmp_path: Path) -> None:
    """kill -9 before the first tensor, at one of the blocks, and at the last one."""
    given = {"average_bits": 4.5}
    gptq = Calibrated(prompts=["red", "green"], samples=2, device="cpu")
    wanted = convert_pipeline(str(tiny_sana), tmp_path / "whole", given, gptq=gptq, call=CALL, progress=False)
    tensors = len(load_file(wanted / WEIGHTS))
    output = tmp_path / "out"
    for count in (0, random.Random(1234).randrange(1, tensors - 1), tensors - 1):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tiny_sana), str(output), str(count)], env=subprocess_environment()
        )
        assert done.returncode == -9
        assert [path.name for path in output.iterdir()] == [".partial"]
        with pytest.raises(ValueError, match="is not a diffusers pipeline: it has no model_index"):
            load_pipeline(output)
    convert_pipeline(str(tiny_sana), output, given, gptq=gptq, call=CALL, progress=False)
    files = [path.relative_to(wanted) for path in sorted(wanted.rglob("*")) if path.is_file()]
    assert [path.relative_to(output) for path in sorted(output.rglob("*")) if path.is_file()] == files
    other = [path for path in files if (wanted / path).read_bytes() != (output / path).read_bytes()]
    assert other == [Path("recipe.yaml")]  # which has the folder's name


def test_widths_are_chosen_on_the_prompts(tiny_sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the whole model in memory chooses them, and within the average."""
    gptq = Calibrated(prompts=CAPTIONS[:3], samples=6, device="cpu")
    made = convert_pipeline(str(tiny_sana), tmp_path / "out", {"average_bits": 5.0}, gptq=gptq, call=CALL)
    assert "choose widths: 6 of 6 samples" in capsys.readouterr().err
    pipeline = whole_pipeline(tiny_sana)
    model, inputs = pipeline.transformer, asked_of(pipeline, CALL)
    layers = {each.names[0]: each.layer for each in targets_of(model, load_recipe(made / "recipe.yaml").config())}
    scheme = load_recipe(made / "recipe.yaml").config().weight_scheme()
    errors = {name: partial(rounding_errors, layer.weight.detach(), scheme, (4, 8)) for name, layer in layers.items()}
    family = FAMILIES["sana"]
    scores = output_sensitivity(model, errors, lambda: inputs, lambda m, each: family.prediction(m(**each)[0]), signs=1)
    wanted = widths_of_average(scores, {name: layer.weight.numel() for name, layer in layers.items()}, 5.0)
    packed = dict(named_layers(load_pipeline(made).transformer, PackedLayer))
    assert {name: layer.weight_bits for name, layer in packed.items()} == wanted
    assert set(wanted.values()) == {4, 8}


def test_what_is_wrong_leaves_nothing(tiny_sana: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sana, tmp_path / "source")
    name = "transformer_blocks.0.ff.conv_inverted.bias"
    edit_tensors(weights_of(folder / "transformer"), lambda tensors: tensors[name].fill_(3e38))
    for gptq, settings, message in (
        (Calibrated(prompts=["red"]), {}, r"block transformer_blocks\.1: its inputs from batch 1 are not"),
        (Calibrated(prompts=[]), {}, "no prompts; give at least one"),
        (Calibrated(prompts=["red"]), {"weight_clip": "max_abs"}, "with --method gptq the clip is mse"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_pipeline(str(folder), tmp_path / "out", settings, gptq=gptq, call=CALL, progress=False)
        assert not (tmp_path / "out").exists()
    for gptq in (Calibrated(prompts=["red"]), None):
        with pytest.raises(ValueError, match="unknown key in recipe: generation"):
            convert_pipeline(str(folder), tmp_path / "out", gptq=gptq, call={"steps": 3}, progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "p.txt"], "--prompts is for GPTQ; give --method gptq too"),
        (["--method", "gptq"], "--method gptq needs prompts to calibrate on; give --prompts FILE"),
        (["--method", "gptq", "--prompts", "p.txt"], "p.txt is empty; write one prompt on each line"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, tiny_sana: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("\n")
    assert main(["convert", str(tiny_sana), "--output", "out", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_command(tiny_sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("red\ndark blue\n")
    call = [f"{name}={'null' if value is None else value}" for name, value in CALL.items()]
    output = tmp_path / "out"
    given = ["--method", "gptq", "--prompts", str(tmp_path / "prompts.txt"), "--samples", "2", "--device", "cpu"]
    assert main(["convert", str(tiny_sana), "--output", str(output), *given, "--set", *call]) == 0
    said = capsys.readouterr()
    assert f"saved {output}" in said.out
    assert "quantize blocks: 2 of 2 blocks, 100%" in said.err
    assert FAMILIES["sana"].name == load_recipe(output / "recipe.yaml").family
    nearest = tmp_path / "nearest"
    assert main(["convert", str(tiny_sana), "--output", str(nearest), "--set", *call]) == 0
    generations = [load_recipe(made / "recipe.yaml").generation for made in (output, nearest)]
    assert generations[0] == generations[1]
    assert {name: generations[1][name] for name in CALL} == CALL
