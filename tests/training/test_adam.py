"""Adam's moments in 32 bits and in 8: what is kept, what it takes, and that a run goes on as if never interrupted."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from fbqat_hub import cli
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training import loop
from fbqat_hub.training.adam import optimizer_bytes, optimizer_of, plain_tensors, set_rate
from fbqat_hub.training.distill import train
from fbqat_hub.training.recipe import Recipe, load_recipe
from tests.conftest import call_of, write_recipe

LOG = "training_log.jsonl"


def torchao() -> None:
    pytest.importorskip("torchao", reason="8-bit moments are torchao's: pip install 'fbqat-hub[torchao]'")


class Layers(nn.Module):
    """Weights that get codes, one that 256 does not divide, a bias and a clip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.odd = nn.Linear(128, 64), nn.Linear(65, 65)
        self.clip = nn.ParameterDict({"log_clip": nn.Parameter(torch.randn(64, 1))})

    def stepped(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            for parameter in self.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()


def test_weight_decay_is_of_weights_and_biases_alone(recipe_of: Any) -> None:
    """A decay would pull a logarithm of a clip, or a factor of a scale, to another clip and scale."""
    layers = Layers()
    layers.large.register_parameter("scale_factor", nn.Parameter(torch.ones(64)))
    for unit in ("absolute", "relative"):
        rule = {"weight_decay": 0.1, "learning_rate_unit": unit}
        groups = optimizer_of(recipe_of(optimizer=rule), layers, layers).param_groups
        decay = {id(each): group["weight_decay"] for group in groups for each in group["params"]}
        without = {name for name, each in layers.named_parameters() if not decay[id(each)]}
        assert without == {"clip.log_clip", "large.scale_factor"}


@pytest.mark.parametrize("bits", [32, 8])
def test_what_moments_take_is_counted(bits: int, recipe_of: Any) -> None:
    if bits == 8:
        torchao()
    layers = Layers()
    optimizer = optimizer_of(recipe_of(optimizer={"moment_bits": bits}), layers, layers)
    layers.stepped(optimizer, 1)
    kept = [plain_tensors("", value) for state in optimizer.state.values() for value in state.values()]
    assert sum(each.nbytes for each in tree_leaves(kept)) == optimizer_bytes(layers.parameters(), bits)


def test_eight_bits_step_as_32_do(recipe_of: Any) -> None:
    """Also at the rate of the moment, and of each group. Moments of few numbers are kept in full."""
    torchao()
    ends = []
    for bits in (32, 8):
        layers = Layers()
        optimizer = optimizer_of(
            recipe_of(
                optimizer={"moment_bits": bits, "clip_learning_rate": 3.0, "learning_rate_unit": "absolute"},
            ),
            layers,
            layers,
        )
        before = [parameter.detach().clone() for parameter in layers.parameters()]
        for rate in (1e-3, 5e-4):
            set_rate(optimizer, rate)
            layers.stepped(optimizer, 3)
        ends.append([now.detach() - then for now, then in zip(layers.parameters(), before, strict=True)])
    codes = [is_traceable_wrapper_subclass(optimizer.state[each]["exp_avg"]) for each in layers.parameters()]
    assert codes == [True, False, False, False, False]
    for exact, ours, in_codes in zip(*ends, codes, strict=True):
        if in_codes:
            assert ((exact - ours).norm() / exact.norm()) < 0.02  # steps of a moment in 8 bits are 1% of it
        else:
            assert torch.allclose(exact, ours, atol=1e-6)  # of numbers of about 1, in float32
    assert ends[0][-1].abs().max() > 2 * ends[0][0].abs().max()  # the clip, at three times the rate


@pytest.mark.parametrize("unit", ["relative", "absolute"])
def test_a_rate_is_relative_to_each_layers_weights_and_to_the_width(unit: str, recipe_of: Any) -> None:
    """A layer of weights 16 times as large moves 16 times as far, and so does its bias; a zero one is not stuck; a
    model of four times the width moves half as far."""
    for width, moves in ((128, 1.0), (512, 0.5)):
        kinds = {name: nn.Linear(width, 8) for name in ("small", "large", "zero")}
        layers = nn.ModuleDict({**kinds, "narrow": nn.Linear(32, 8)})
        layers["clip"] = nn.ParameterDict({"log_clip": nn.Parameter(torch.zeros(64, 1))})
        with torch.no_grad():
            for name, root_mean_square in (("small", 0.01), ("large", 0.16), ("zero", 0.0), ("narrow", 0.01)):
                layers[name].weight.mul_(root_mean_square / layers[name].weight.square().mean().sqrt())
        teacher = copy.deepcopy(layers)
        layers["large"].weight.data.mul_(3)  # the student's own weights do not count
        recipe = recipe_of(optimizer={"learning_rate_unit": unit, "clip_learning_rate": 2.0}, learning_rate=0.25)
        optimizer = optimizer_of(recipe, layers, teacher)
        set_rate(optimizer, 0.25)
        before = {name: value.detach().clone() for name, value in layers.named_parameters()}
        for parameter in layers.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
        optimizer.step()
        moved = {name: (before[name] - value).mean().item() for name, value in layers.named_parameters()}
        for name, share in (("small", 0.0025), ("large", 0.04), ("zero", 0.00025), ("narrow", 0.0025)):
            expected = share * moves if unit == "relative" else 0.25
            assert moved[f"{name}.weight"] == pytest.approx(expected, rel=1e-4)
            assert moved[f"{name}.bias"] == pytest.approx(expected, rel=1e-4)
        assert moved["clip.log_clip"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_gives_the_codes_of_an_uncompiled_one() -> None:
    """As GPUs take it; here it is compiled for the CPU, for half a minute."""
    torchao()
    from torchao.optim import Adam8bit

    states, weights = [], []
    for stance in ("force_eager", "default"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 64))
        optimizer = Adam8bit([weight])
        with torch.compiler.set_stance(stance):
            for _ in range(3):
                weight.grad = torch.randn_like(weight)
                optimizer.step()
        states.append(plain_tensors("moment", optimizer.state[weight]["exp_avg"]))
        weights.append(weight.detach())
    assert torch.equal(states[0]["moment.codes"], states[1]["moment.codes"])
    assert torch.allclose(*weights, atol=1e-6)


def test_without_torchao_it_is_said_before_anything_is_read(
    recipe_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_fields | {"optimizer": {"moment_bits": 8}})
    assert cli.main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said == (
        "fbqat: error: fbqat train needs torchao, which is not installed: pip install 'fbqat-hub[torchao]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_was_saved_before_has_32_bits(recipe_of: Any, tmp_path: Path) -> None:
    saved = recipe_of().to_dict()
    del saved["optimizer"]["moment_bits"]
    assert load_recipe(write_recipe(tmp_path / "recipe.yaml", saved)) == recipe_of()


def test_other_widths_of_moments_are_refused(recipe_fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"optimizer.moment_bits is 4; it must be 8 or 32"):
        Recipe(**recipe_fields | {"optimizer": {"moment_bits": 4}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"schedule": {"stages": [[8, 2], [6, 2], [4, 2]]}}], ids=["4 bits", "falling widths"]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    changes: dict[str, Any], recipe_of: Any, teacher_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments in codes are in the checkpoint. Of clips whose width changes, they are made anew."""
    torchao()
    teacher = teacher_of("flux")  # of whose layers some have 4096 weights
    changes = changes | {"generation": call_of("flux", load_pipeline(teacher, meta=True)), "method": "lsq-qat"}
    adam = {"moment_bits": 8, "warmup_steps": 2, "max_grad_norm": 1.0}
    recipe = recipe_of(family="flux", teacher=str(teacher), optimizer=adam, **changes)
    whole = train(recipe, tmp_path / "whole", progress=False)
    step = loop.Loop.step

    def stopping(self: Any, number: int) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", progress=False)
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "state.safetensors")
    assert any(name.endswith("exp_avg_sq.codes") for name in stored)
    run = train(recipe, tmp_path / "run", resume=True, progress=False)
    assert (run / LOG).read_text() == (whole / LOG).read_text()
    ours, theirs = (load_file(each / "transformer/diffusion_pytorch_model.safetensors") for each in (run, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
