"""Training with FSDP2 in two processes on CPUs: the run of one process, in parts.

accelerate chooses FSDP among its kinds of several GPUs alone (``AcceleratorState.__init__``): several CPUs get DDP,
whatever it is told. The script here makes it choose FSDP for them too; all that comes after is accelerate's and torch's
own, with gloo in the place of NCCL.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn

from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import FakeQuantizedLinear, named_layers
from fbqat_hub.training import loop
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.distill import train
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.lora_merge import streamed_denoiser
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.sharding import check_sharding, gathered, shared_like, skeleton_of
from fbqat_hub.training.student import prepare_student, prepare_student_by_blocks
from tests.conftest import SANA_FIRST, call_of, write_recipe
from tests.training.test_processes import log_of, same_up_to_rounding, share_that_differs, two_processes

# argument 1: the rank that fails in step 5, or -1; argument 2: where the first process writes what it holds. A run that
# is resumed would fail where it calibrates or chooses again
SHARDED = """
import json, sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from fbqat_hub.cli import main
from fbqat_hub.training import loop, student
from fbqat_hub.training.sharding import gathered

if "--resume" in sys.argv:
    student.start = student.chosen_widths = student.chosen_widths_by_blocks = None
init, step, norms = AcceleratorState.__init__, loop.Loop.step, []

def on_cpus(self, *args, fsdp_plugin=None, **options):
    init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

def held(values):
    return [[each.numel(), (each.to_local() if isinstance(each, DTensor) else each).numel()] for each in values]

def stepping(self, number):
    if number == 4 and self.accelerator.process_index == int(sys.argv[1]):
        raise OSError(28, "No space left on device")
    line = step(self, number)
    moments = [state["exp_avg"] for state in self.optimizer.state.values()]
    if number == 0:
        norms.append(sum(float(gathered(each).dequantize().square().sum()) for each in moments) ** 0.5)
    if self.accelerator.is_main_process:
        blocks = [self.teacher.get_submodule(name) for name in self.draws.family.blocks(self.teacher)]
        of_teacher = [each for block in blocks for each in block.parameters()]  # its root stays whole between steps
        parts = {"student": self.student.parameters(), "teacher": of_teacher, "moments": moments}
        with open(sys.argv[2], "w") as file:
            codes = sum(hasattr(getattr(each, "_local_tensor", each), "codes") for each in moments)
            json.dump({"norm": norms, "codes": codes, **{name: held(values) for name, values in parts.items()}}, file)
    return line

AcceleratorState.__init__, loop.Loop.step = on_cpus, stepping
sys.exit(main(sys.argv[3:]))
"""

# a step of the grid of 8 bits is a sixteenth, and so is the rate
AVERAGE = {"quantization": {"average_bits": 5.0}, "learning_rate": 6e-5}


EIGHT = {"optimizer": {"moment_bits": 8, "warmup_steps": 2}}


def fields_of(changes: dict[str, Any], teacher_of: Any) -> dict[str, Any]:
    """The changes; 8-bit moments are of a family of whose layers some have 4096 weights."""
    if changes is not EIGHT:
        return changes
    pytest.importorskip("torchao", reason="8-bit moments are torchao's: pip install 'fbqat-hub[torchao]'")
    teacher = teacher_of("flux")
    call = call_of("flux", load_pipeline(teacher, meta=True))
    return changes | {"family": "flux", "teacher": str(teacher), "generation": call}


def widths_of(run: Path) -> dict[str, int]:
    config: dict[str, Any] = json.loads((run / "transformer" / "config.json").read_text())["quantization_config"]
    return config.get("weight_bits_by_module", {})


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``sharded(*arguments, fails=RANK)``: the command line in two processes with FSDP2."""
    launched = launch_command_parser().parse_args(["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "x"])
    environment = prepare_multi_gpu_env(_validate_launch_command(launched)[0])
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, environment[name])
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)

    def run(*arguments: str, fails: int = -1) -> subprocess.CompletedProcess[str]:
        done = two_processes(str(script), str(fails), str(tmp_path / "held.json"), *arguments)
        assert (done.returncode != 0) == (fails >= 0), done.stderr
        return done

    return run


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``alone(recipe, output)``: `train` in this process, which accelerate leaves alone."""

    def run(recipe: Recipe, output: Path, *, resume: bool = False) -> Path:
        with monkeypatch.context() as patch:
            patch.delenv("ACCELERATE_USE_FSDP", raising=False)
            return train(recipe, output, resume=resume, progress=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sana", {"validate_every": 3, "optimizer": {"max_grad_norm": 1e-3, "warmup_steps": 2}}),
        ("sana", AVERAGE),
        ("flux", {"gradient_checkpointing": True, "micro_batch_size": 1}),
        ("sd3", {}),  # its last block trains what has no effect
        ("flux", EIGHT),
    ],
    ids=[
        "clipped and validated",
        "of two widths",
        "checkpointed, in parts of a batch",
        "without gradients of some",
        "moments of 8 bits",
    ],
)
def test_two_processes_in_parts_train_as_one(
    family: str,
    changes: dict[str, Any],
    recipe_fields: dict[str, Any],
    teacher_of: Any,
    sharded: Any,
    alone: Any,
    tmp_path: Path,
) -> None:
    teacher = teacher_of(family)
    call = call_of(family, load_pipeline(teacher, meta=True)) | {"num_inference_steps": 9}
    own = {"family": family, "teacher": str(teacher), "generation": call}
    fields = recipe_fields | own | fields_of(changes, teacher_of)
    one, two = alone(Recipe(**fields), tmp_path / "one"), tmp_path / "two"
    sharded("train", str(write_recipe(tmp_path / "recipe.yaml", fields)), "--output", str(two))
    validation = [[line["validation_loss"] for line in log_of(run) if "validation_loss" in line] for run in (one, two)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-3)
    assert len(validation[0]) == (2 if "validate_every" in changes else 0)
    assert widths_of(two) == widths_of(one)
    assert bool(widths_of(one)) == (changes is AVERAGE)
    same_up_to_rounding(one, two, 1e-4 if changes is AVERAGE else 5e-5)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    held = json.loads((tmp_path / "held.json").read_text())
    assert bool(held.pop("codes")) == (changes is EIGHT)
    norms = held.pop("norm")  # of the first moments after a step: 1 - beta_1 of the gradient's
    if "max_grad_norm" in changes.get("optimizer", {}):
        assert norms == [pytest.approx(0.1 * changes["optimizer"]["max_grad_norm"], rel=1e-3)]
    for name, sizes in held.items():
        whole, part = map(sum, zip(*sizes, strict=True))
        assert 0.5 <= part / whole < 0.52, name  # rows of an odd number are more in one


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "changes"), [(0, {}), (1, AVERAGE), (1, EIGHT)])
def test_an_error_of_one_ends_both_and_one_process_goes_on_with_whole_layers(
    rank: int,
    changes: dict[str, Any],
    recipe_of: Any,
    recipe_fields: dict[str, Any],
    teacher_of: Any,
    sharded: Any,
    alone: Any,
    tmp_path: Path,
) -> None:
    changes = fields_of(changes, teacher_of)
    recipe, run = write_recipe(tmp_path / "recipe.yaml", recipe_fields | changes), tmp_path / "run"
    done = sharded("train", str(recipe), "--output", str(run), fails=rank)
    assert "No space left on device" in done.stderr
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]
    alone(recipe_of(**changes), run, resume=True)
    same_up_to_rounding(run, alone(recipe_of(**changes), tmp_path / "one"), 1e-4 if changes else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, AVERAGE, EIGHT], ids=["4 bits", "two widths", "moments of 8 bits"])
def test_two_go_on_with_parts_of_what_one_saved(
    changes: dict[str, Any],
    recipe_of: Any,
    recipe_fields: dict[str, Any],
    teacher_of: Any,
    sharded: Any,
    alone: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = fields_of(changes, teacher_of)
    recipe, run, step = (
        write_recipe(tmp_path / "recipe.yaml", recipe_fields | changes),
        tmp_path / "run",
        loop.Loop.step,
    )

    def stopping(self: Any, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            alone(recipe_of(**changes), run)
    sharded("train", str(recipe), "--output", str(run), "--resume")
    same_up_to_rounding(run, alone(recipe_of(**changes), tmp_path / "one"), 1e-4 if changes else 1e-5)


@pytest.mark.parametrize("name", SANA_FIRST)
@pytest.mark.parametrize("average", [None, 5.0], ids=["4 bits", "two widths"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_student_made_block_by_block_has_the_same_numbers(
    name: str, static: bool, average: float | None, recipe_of: Any, teacher_of: Any, tmp_path: Path
) -> None:
    """Weights and clips to the bit, at 8 bits but for one in a thousand; and the teacher stays as it is."""
    folder = teacher_of(name)
    pipeline = load_pipeline(folder)
    recipe = recipe_of(
        family=name, teacher=str(folder), generation=call_of(name, pipeline), calibration={"samples": 3},
        quantization={"activation_range": "static" if static else "per_token", "average_bits": average},
    )  # fmt: skip
    teacher = pipeline.transformer
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    splits = cached_splits(recipe, pipeline)
    draws = Draws(get_family(name), pipeline.scheduler, recipe.generation, recipe.seed)
    whole = prepare_student(recipe, teacher, splits["train"], draws)
    streamed = streamed_denoiser(recipe)
    blocks, skeleton = prepare_student_by_blocks(recipe, streamed, splits["train"], draws, Accelerator(cpu=True))
    widths = {layer.bit_width for _, layer in named_layers(blocks, FakeQuantizedLinear)}
    assert widths == ({4} if average is None else {4, 8})
    ours, theirs = blocks.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        if key.endswith("input_scale"):  # what goes on is of the float layers, and of the same as linear layers there
            assert value.allclose(theirs[key], rtol=1e-5), key
        elif average is not None:  # of such codes 16 times as many are at an edge that the last digit of an input moves
            assert share_that_differs(value, theirs[key]) < 1e-3, key
            assert value.allclose(theirs[key], atol=float(theirs[key].abs().max()) / 64), key
        else:
            assert torch.equal(value, theirs[key]), key
    trained = [[key for key, value in each.named_parameters() if value.requires_grad] for each in (blocks, whole)]
    assert trained[0] == trained[1]
    for each in streamed.names:
        streamed.model.set_submodule(each, streamed.block(each))
    assert all(torch.equal(value, before[key]) for key, value in streamed.model.state_dict().items())
    assert not {id(each) for each in blocks.parameters()} & {id(each) for each in streamed.model.parameters()}
    assert [(key, value.shape) for key, value in skeleton.named_parameters()] == [
        (key, value.shape) for key, value in blocks.named_parameters()
    ]
    assert all(value.is_meta for value in skeleton.parameters())


def of_kind(kind: DistributedType, version: int = 2) -> Any:
    return SimpleNamespace(
        distributed_type=kind, state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    )


def test_other_ways_to_share_out_layers_are_refused(recipe_of: Any) -> None:
    check_sharding(recipe_of(), Accelerator(cpu=True))
    check_sharding(recipe_of(), of_kind(DistributedType.FSDP))
    for accelerator in (of_kind(DistributedType.FSDP, 1), of_kind(DistributedType.DEEPSPEED)):
        with pytest.raises(ValueError, match="here is FSDP2: accelerate launch --use_fsdp --fsdp_version 2"):
            check_sharding(recipe_of(), accelerator)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": "blockwise"}, "training: blockwise"),
        ({"method": "integer"}, "schedule.stages of several widths"),
        ({"method": "integer", "mixed_precision": "fp16"}, "of several widths and mixed_precision: fp16"),
    ],
)
def test_what_needs_whole_layers_is_refused(changes: dict[str, Any], named: str, recipe_of: Any) -> None:
    with pytest.raises(ValueError, match=rf"{named} cannot be trained with FSDP2; use DDP"):
        check_sharding(recipe_of(**changes), of_kind(DistributedType.FSDP))


def test_without_parts_tensors_stay_as_they_are() -> None:
    value = torch.ones(2)
    assert gathered(value) is value
    assert shared_like(value, torch.zeros(2)) is value


def test_a_skeleton_has_everything_but_the_numbers_of_parameters() -> None:
    layer = nn.BatchNorm1d(3).requires_grad_(False)
    skeleton = skeleton_of(layer)
    assert skeleton.weight.is_meta
    assert not skeleton.weight.requires_grad
    assert torch.equal(skeleton.running_var, layer.running_var)
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(skeleton.weight, layer.weight)
