"""Training with each layer shared out to the processes: FSDP2, through accelerate and torch's ``fully_shard``.

A process keeps its rows of every weight, gradient and moment, of the teacher too, and has a block whole only while that
computes. What needs whole layers is done before (calibration, GPTQ) or by gathering one tensor at a time (checkpoints,
the finished student). Validation runs in every process, for a forward is one of all.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import OffloadPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from fbqat_hub.families import Family
from fbqat_hub.training.adam import part_in_codes
from fbqat_hub.training.recipe import Recipe

_UNKNOWN = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """What ``accelerate launch --use_fsdp`` asks for; None if it was not said."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    # the launcher's default leaves text encoders empty in all processes but one, and takes no buffers
    return FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether processes hold parts of layers."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def check_sharding(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise ValueError where accelerate would share out layers in a way that this training has not, or of a recipe
    that needs them whole."""
    kind = accelerator.distributed_type
    if kind in _UNKNOWN or (is_sharded(accelerator) and accelerator.state.fsdp_plugin.fsdp_version != 2):
        raise ValueError(
            f"accelerate is set up for {kind.value}; what shares out layers here is FSDP2: accelerate launch "
            "--use_fsdp --fsdp_version 2. Where one device holds the model, use --multi_gpu (DDP)."
        )
    if is_sharded(accelerator) and (found := needs_whole_layers(recipe)):
        raise ValueError(
            f"recipe: {' and '.join(found)} cannot be trained with FSDP2; use DDP (--multi_gpu), or change it."
        )


def needs_whole_layers(recipe: Recipe) -> list[str]:
    """What a recipe asks for that has no form in parts."""
    asked = {
        "training: blockwise": recipe.training == "blockwise",
        "schedule.stages of several widths": len(recipe.bit_schedule().stages) > 1,
        "mixed_precision: fp16": recipe.mixed_precision == "fp16",
    }
    return [name for name, is_asked in asked.items() if is_asked]


def share_out_blocks(accelerator: Accelerator, family: Family, denoiser: nn.Module) -> None:
    """Say to accelerate how denoisers like this one are shared out: block by block, in the precision of the masters."""
    plugin = accelerator.state.fsdp_plugin
    classes = {type(denoiser.get_submodule(name)).__name__ for name in family.blocks(denoiser)}
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, sorted(classes)
    plugin.mixed_precision_policy = None  # codes are of float32 weights; autocast rounds what comes after


def share_out(accelerator: Accelerator, block: nn.Module) -> None:
    """Share a block out as accelerate would with the whole model; of a process there stays its part, on the device."""
    plugin = accelerator.state.fsdp_plugin
    offload = plugin.cpu_offload or OffloadPolicy()
    fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, offload_policy=offload)


def skeleton_of(student: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes and no numbers."""
    empty = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad)
        for each in student.parameters()
    }
    return copy.deepcopy(student, empty)


def gathered(value: Tensor) -> Tensor:
    """A tensor of which processes hold parts, whole, on the CPU; all must call this. Others stay as they are."""
    if not isinstance(value, DTensor):
        return value
    whole: Any = value.full_tensor()
    if is_traceable_wrapper_subclass(whole):  # a moment in 8 bits, whose tensors may be on their way: a copy waits
        whole = transform_subclass(whole, lambda _, part: part.clone())
    tensor: Tensor = whole.cpu()
    return tensor


def shared_like(value: Tensor, own: Tensor | None) -> Tensor:
    """This process's part of a whole tensor, which all processes have, where ``own`` is one in parts."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    if hasattr(value, "codes"):  # a moment in 8 bits
        return part_in_codes(value, own)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def whole_student(student: nn.Module, skeleton: nn.Module, accelerator: Accelerator) -> nn.Module | None:
    """What was trained in parts, on the CPU of the first process; None in the others."""
    tensors: Mapping[str, Any] = student.state_dict()
    whole = {}
    for name, value in tensors.items():
        tensor = gathered(value.detach())
        if accelerator.is_main_process:
            whole[name] = tensor.cpu()
    if not accelerator.is_main_process:
        return None
    skeleton.load_state_dict(whole, assign=True)
    return skeleton
