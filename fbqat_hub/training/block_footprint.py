"""Memory of block-wise training from configs alone: every kind of block makes a step without numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from fbqat_hub.families import get_family
from fbqat_hub.quantization import FakeQuantizedLinear
from fbqat_hub.quantization.blocks import BlockWalk, Call, moved_tensors
from fbqat_hub.quantization.clip import Clip
from fbqat_hub.training.adam import optimizer_bytes
from fbqat_hub.training.bases import Configs, build
from fbqat_hub.training.blockwise import block_loss, forward_arguments
from fbqat_hub.training.footprint import Storages, denoiser_arguments, fake_student
from fbqat_hub.training.recipe import Recipe


@dataclass(frozen=True)
class BlockMemory:
    """Bytes that block-wise training takes.

    Attributes:
        block: on the device, of the largest block: its weights, gradients, optimizer and activations.
        name: of that block.
        count: how many blocks are trained.
        kept: in the host's memory, of all samples: what goes into a block of the teacher and of the student, and what
            comes out.
        teacher: in the host's memory, its denoiser in the precision of training.
        tuning: on the device, of the last stage, without the packed student; 0 if there is none.
    """

    block: int
    name: str
    count: int
    kept: int
    teacher: int
    tuning: int


def block_memory(recipe: Recipe, configs: Configs) -> BlockMemory:
    """What block-wise training of the recipe takes, whatever its ``training`` says.

    Args:
        configs: of the teacher's models, "transformer" and "vae" among them.
    """
    family, dtype = get_family(recipe.family), recipe.half or torch.float32
    inputs, of_tuning = (
        denoiser_arguments(recipe, configs, size)
        for size in (recipe.batch_size, min(recipe.batch_size, recipe.micro_batch_size or recipe.batch_size))
    )
    largest, kept, steps, seen = (0, ""), 0, 0, set()
    with FakeTensorMode() as fake, Storages() as storages:

        def shaped(given: dict[str, Any]) -> dict[str, Any]:
            fakes = tree_map(lambda each: fake.from_tensor(each).clone() if isinstance(each, Tensor) else each, given)
            return forward_arguments(family, fakes, dtype)

        inputs = shaped(inputs)
        teacher: Any = _in_precision(build(configs["transformer"]).eval(), dtype)
        student = _in_precision(fake_student(recipe, build(configs["transformer"]).requires_grad_(False)), dtype)
        names = family.blocks(teacher)
        with BlockWalk(teacher, names, [inputs]) as walk:
            for number, name in enumerate(names):
                call, block = walk.calls[0], student.get_submodule(name)
                made = call.run(walk.blocks[number])
                kept = max(kept, 2 * _bytes(call) + _bytes(made))
                kind = (type(block), tuple(each.shape for each in block.parameters()))
                steps += any(each.requires_grad for each in block.parameters())
                if kind not in seen:
                    seen.add(kind)
                    largest = max(largest, (_step(recipe, block, call, made, storages), name))
                walk.advance([made])
        weights = sum(each.nbytes for each in teacher.parameters())
        if recipe.gradient_checkpointing:
            teacher.enable_gradient_checkpointing()
        tuning = weights + _tuned(teacher.train(), shaped(of_tuning), storages) if recipe.blockwise.tuning_steps else 0
    batches = -(-recipe.blockwise.samples // recipe.batch_size)
    return BlockMemory(
        block=largest[0], name=largest[1], count=steps, kept=batches * kept, teacher=weights, tuning=tuning
    )


def _step(recipe: Recipe, block: nn.Module, call: Call, wanted: Any, storages: Storages) -> int:
    """Bytes of a step of one block, from the second step on."""
    weights = sum(each.nbytes for each in (*block.parameters(), *block.buffers()))
    trained = [each for each in block.parameters() if each.requires_grad]
    storages.peak = before = storages.bytes
    block_loss(call.run(block), wanted).backward() if trained else call.run(block)
    peak = storages.peak - before
    moments = optimizer_bytes((each for each in trained if each.grad is not None), recipe.optimizer.moment_bits)
    block.zero_grad()
    return weights + peak + moments + _bytes(call) + _bytes(wanted)


def _tuned(model: nn.Module, inputs: Mapping[str, Any], storages: Storages) -> int:
    """Bytes of the activations where nothing but biases is trained: what autograd keeps of frozen layers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    storages.peak = before = storages.bytes
    output: Any = model(**inputs)[0]
    (output[0] if isinstance(output, list) else output).float().square().mean().backward()
    return storages.peak - before


def _in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With what is not fake-quantized in ``dtype``, frozen; masters stay in float32."""
    for module in model.modules():
        if isinstance(module, (FakeQuantizedLinear, Clip)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, moved_tensors(buffer, dtype=dtype))
    return model


def _bytes(value: Any) -> int:
    """Of a nest's tensors, each storage once."""
    storages = {
        each.untyped_storage()._cdata: each.untyped_storage().nbytes()
        for each in tree_leaves(value)
        if isinstance(each, Tensor)
    }
    return sum(storages.values())
