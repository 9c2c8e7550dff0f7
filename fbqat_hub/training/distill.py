"""A run: a recipe's teacher in, a packed pipeline in a folder out, resumable on the way."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.families import get_family
from fbqat_hub.integrations.diffusers import attach
from fbqat_hub.integrations.transformers import text_encoder_writers
from fbqat_hub.pipelines import save_quantized
from fbqat_hub.quantization import PackedLayer, convert, named_layers, set_bit_width
from fbqat_hub.training.adam import check_optimizer
from fbqat_hub.training.blockwise import train_blockwise
from fbqat_hub.training.cache import CachedSplit, cached_splits
from fbqat_hub.training.checkpoint import differences, newest_checkpoint, widths_in
from fbqat_hub.training.dataset import check_local_data
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import accelerator_of, distill, own_parts
from fbqat_hub.training.lora_merge import float_pipeline, pinned_recipe, streamed_denoiser
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.sharding import is_sharded, share_out
from fbqat_hub.training.student import (
    check_layers,
    narrow_teacher,
    prepare_student,
    prepare_student_by_blocks,
    resumed_student,
)
from fbqat_hub.untrusted import read_yaml


def train(recipe: Recipe, output: Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Quantize the recipe's teacher and save the packed pipeline in ``output``.

    Leaves ``output`` as a diffusers pipeline folder with ``recipe.yaml`` and ``training_log.jsonl`` (one line per step:
    step, loss, bit_width, learning_rate), and with ``keep_stages`` the packed denoiser of each stage
    (``fbqat_hub.stages``). While it runs, checkpoints are in ``output/checkpoints``.

    Under ``accelerate launch`` every process trains on its share of each batch; the first one encodes and writes, so
    all must see the same folders. A run can be resumed by another number of processes.

    Args:
        output: an empty or new folder, or with ``resume`` one of an interrupted run of the same recipe.
        resume: continue from the newest checkpoint that is whole, without calibrating again (from the start if there
            is none).
        progress: show progress bars.

    Raises:
        FileExistsError: ``output`` has other content.
        FileNotFoundError, ValueError: data that is not there.
        ValueError: ``output`` was started with another recipe, the teacher is not a float pipeline of the family, or
            the batch cannot be shared out equally to the processes.
        ImportError: 8-bit moments of Adam without torchao.
    """
    if recipe.calibration_prompts:
        raise ValueError(
            f"recipe: calibration_prompts is {recipe.calibration_prompts}: the codes are those of fbqat convert "
            "--method gptq --prompts FILE, not of a data set. Convert again, or set calibration_prompts=0."
        )
    check_optimizer(recipe.optimizer)
    if resume:
        recipe = as_started(recipe, output)
    finished = is_finished(recipe, output, resume)
    accelerator = accelerator_of(recipe)
    if recipe.steps:  # an error here comes before the hours of encoding
        own_parts(recipe, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()  # all have seen the folder as it was
    if finished:
        if accelerator.is_main_process:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)  # killed just before it did so itself
        return output
    check_local_data(recipe.dataset)
    torch.manual_seed(recipe.seed)
    blockwise, sharded = recipe.training == "blockwise", is_sharded(accelerator)
    with accelerator.main_process_first():  # it downloads and encodes; the others read what it left
        recipe, source = pinned_recipe(recipe)
        writers = text_encoder_writers(source, recipe.text_encoders)  # refuses them before the training
        pipeline = load_teacher(recipe, meta=sharded and not accelerator.is_main_process)
        check_layers(recipe, pipeline.transformer)  # so do patterns that match no layer
        splits = _encoded(recipe, pipeline, accelerator.device, in_parts=blockwise or sharded)
    device = "cpu" if blockwise or sharded else accelerator.device  # where inputs of blocks are kept
    draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.generation, recipe.seed, device)
    student: Any = None
    skeleton: Any = None
    teacher = pipeline.transformer
    del pipeline  # its text encoders would stay in memory
    begun = newest_checkpoint(output / "checkpoints", recipe.as_yaml()) if resume and not blockwise else None
    saved = widths_in(begun) if begun else None
    if sharded:
        blocks, share = streamed_denoiser(recipe), functools.partial(share_out, accelerator)
        teacher = blocks.model
        student, skeleton = prepare_student_by_blocks(
            recipe, blocks, splits["train"], draws, accelerator, saved=saved, share=share if recipe.steps else None
        )
        for name in blocks.names if recipe.steps else ():
            block = blocks.block(name)
            narrow_teacher(recipe, block, student.get_submodule(name))
            share(block)
            teacher.set_submodule(name, block)
        draws.device = accelerator.device
    elif saved is not None:
        student = resumed_student(recipe, teacher.to(device), saved)
    elif not blockwise:
        student = prepare_student(recipe, teacher.to(device), splits["train"], draws)
    if not blockwise:
        narrow_teacher(recipe, teacher, student)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)  # from here on the recipe and its teacher are known to be good
        recipe.save(output / "recipe.yaml")
    options: Any = {"resume": resume, "progress": progress}
    if blockwise:
        student = train_blockwise(recipe, teacher, splits, draws, output, accelerator, **options)
    elif recipe.steps:
        student = distill(recipe, student, teacher, splits, draws, output, accelerator, skeleton=skeleton, **options)

    if accelerator.is_main_process:
        if not blockwise:
            set_bit_width(student, recipe.quantization.weight_bits)
            convert(student)
        widths = {name: layer.weight_bits for name, layer in named_layers(student, PackedLayer)}
        attach(student, recipe.config().with_widths(widths))
        save_quantized(student.cpu(), source, output, writers)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    return output


def load_teacher(recipe: Recipe, *, meta: bool = False) -> Any:
    """The recipe's pipeline in float32, or in bfloat16 for blocks that are trained in it.

    Args:
        meta: without numbers.

    Raises:
        ValueError: it is of another family, or quantized.
    """
    family = get_family(recipe.family)
    pipeline = float_pipeline(recipe, recipe.teacher_dtype, meta=meta)
    if type(pipeline).__name__ != family.pipeline_class:
        raise ValueError(f"teacher {recipe.teacher} is a {type(pipeline).__name__}; {family.name} is not its family.")
    if getattr(pipeline.transformer, "is_quantized", False):
        raise ValueError(f"teacher {recipe.teacher} is quantized already; give the full-precision pipeline.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _encoded(recipe: Recipe, pipeline: Any, device: torch.device, *, in_parts: bool) -> dict[str, CachedSplit]:
    """The recipe's data, encoded on ``device``; the pipeline is on the CPU again, to make room for the training."""
    if pipeline.transformer.device.type == "meta":  # the first process has encoded
        return cached_splits(recipe, pipeline)
    if in_parts and device.type != "cpu":  # which may have no room for the whole pipeline
        pipeline.enable_model_cpu_offload(device=device)
        splits = cached_splits(recipe, pipeline)
        pipeline.remove_all_hooks()
    else:
        splits = cached_splits(recipe, pipeline.to(device))
    pipeline.to("cpu")
    return splits


def is_finished(recipe: Recipe, output: Path, resume: bool) -> bool:
    """Whether ``output`` is a finished run of the recipe that is to be resumed.

    Raises:
        FileExistsError: it has content that is not to be, or cannot be, continued.
        ValueError: it was started with another recipe.
    """
    if not output.exists() or not any(output.iterdir()):
        return False
    finished, started = (output / "model_index.json").exists(), (output / "recipe.yaml").exists()
    if started and resume and (other := _other_recipe(recipe, output / "recipe.yaml")):
        raise ValueError(
            f"{output} was started with another recipe, so it cannot be continued with this one: {other.rstrip('.')}. "
            "Give another --output, or the recipe it was started with."
        )
    if not (started and resume):
        hint = "use --resume to continue it" if started and not finished else "give another --output"
        raise FileExistsError(f"{output} exists and is not empty; {hint}.")
    return finished


def as_started(recipe: Recipe, output: Path) -> Recipe:
    """The recipe with the commits of its teacher and adapter that the run in ``output`` began with, where it names none
    itself."""
    try:
        saved = read_yaml(output / "recipe.yaml")
        began = {"teacher": str(saved["teacher"]), "lora": str(saved.get("lora"))}
    except (FileNotFoundError, KeyError, TypeError, ValueError):  # said later, of what is broken
        return recipe
    same: dict[str, Any] = {key: value for key, value in began.items() if value.startswith(f"{getattr(recipe, key)}@")}
    return replace(recipe, **same)


def _other_recipe(recipe: Recipe, saved: Path) -> str:
    """How the recipe that a run saved differs from this one; empty if it does not."""
    try:
        data = read_yaml(saved)
        if not isinstance(data, dict) or "recipe_version" not in data:
            return "it was saved by an older version of fbqat_hub, which did not write out what the method meant"
        return "; ".join(differences(load_recipe(saved).to_dict(), recipe.to_dict()))
    except ValueError as error:
        return str(error)
