"""Adam: what it trains at which rate, and its two moments, in 32 bits or 8.

With 8 bits a moment is stored as codes of a table of 256 values, with one scale for 256 numbers (arXiv 2110.02861), by
torchao. Tensors that 256 does not divide, or of fewer than 4096 numbers (biases, clips), keep 32 bits. On a GPU torchao
compiles the step of every shape of weight when it is first made. On a CPU, where that needs a C++ compiler and half a
minute, the same step runs uncompiled.

Of a weight that processes share out (FSDP2) each keeps the codes of its part, which are those of the whole one. Where
the parts are not equal, or 256 does not divide them, its moments keep 32 bits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fbqat_hub.quantization.packed import SCALE_FACTOR
from fbqat_hub.training.method import Optimizer

# Of torchao: numbers that share a scale, and the smallest tensor that is quantized.
_BLOCK, _SMALLEST = 256, 4096
_TABLE_BYTES = 256 * 4
# A layer whose weights are smaller, as those that start at zero, is trained as if it had this root mean square
# (arXiv 1804.04235, section 8).
_LEAST = 1e-3
_CLIPS = "log_clip"
# Parameters that are scales, or their factors: no weight decay, which would pull these from 1 to 0.
_SCALES = (_CLIPS, SCALE_FACTOR)
# Of the models that relative rates were chosen at.
_WIDTH = 128


class Rates(Protocol):
    """What of a recipe says how its optimizer runs."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def optimizer(self) -> Optimizer: ...


def check_optimizer(rule: Optimizer) -> None:
    """Raise ImportError where a recipe asks for 8-bit moments and torchao is not installed."""
    if rule.moment_bits == 8:
        import torchao  # noqa: F401


def optimizer_of(recipe: Rates, student: nn.Module, teacher: nn.Module) -> torch.optim.Optimizer:
    """Adam of what is trainable: weights and biases, each layer at its own rate, and clips at one of theirs.

    Args:
        teacher: whose layers have the same names. A rate that is a share of a layer's weights is one of these, which
            stay as they are, so that a resumed run has the same.

    Raises:
        ImportError: as `check_optimizer`.
    """
    rule, width = recipe.optimizer, _width_of(student)
    relative = rule.learning_rate_unit == "relative"
    groups: dict[str, dict[str, Any]] = {}

    def of(group: str) -> dict[str, Any]:
        if group in _SCALES:
            return {"params": [], "factor": rule.clip_learning_rate if group == _CLIPS else 1.0, "weight_decay": 0.0}
        factor = relative_unit(teacher.get_parameter(f"{group}.weight"), width) if relative else 1.0
        return {"params": [], "factor": factor, "weight_decay": rule.weight_decay}

    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            layer, _, own = name.rpartition(".")
            group = own if own in _SCALES else layer if relative else ""
            if group not in groups:
                groups[group] = of(group)
            groups[group]["params"].append(parameter)
    if rule.moment_bits == 8:
        return _adam_8bit()([*groups.values()], lr=recipe.learning_rate)
    return torch.optim.Adam([*groups.values()], lr=recipe.learning_rate, fused=True)


def relative_unit(weight: Tensor, width: float) -> float:
    """What a relative rate is a share of: the root mean square of a weight, times sqrt(128 / width).

    The first is the relative step size of Adafactor (arXiv 1804.04235, section 8). The second is how rates go with
    width (maximal update parametrization, arXiv 2203.03466): Adam moves all weights of a row by about the rate, and the
    row's output by up to ``width`` times that, while the output itself grows with the root of the width.

    Args:
        weight: of any shape.
        width: inputs of most layers of the model.

    >>> round(relative_unit(torch.full((4, 8), 0.25), 512), 6), relative_unit(torch.zeros(4, 8), 128)
    (0.125, 0.001)
    """
    norm = torch.linalg.vector_norm(weight.detach().float())
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return max(float(whole) / math.sqrt(weight.numel()), _LEAST) * math.sqrt(_WIDTH / width)


def _width_of(student: nn.Module) -> float:
    """The median of the inputs of its layers that are trained, 128 if there is none."""
    inputs = [each.shape[1] for each in student.parameters() if each.requires_grad and each.shape[1:].numel() > 1]
    return statistics.median_low(inputs) if inputs else _WIDTH


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its multiple of a learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(rate * group["factor"])
        else:
            group["lr"] = rate * group["factor"]


def optimizer_bytes(parameters: Iterable[nn.Parameter], bits: int) -> int:
    """What the optimizer of trained ``parameters`` keeps, from their shapes alone.

    >>> weight = nn.Parameter(torch.empty(64, 64))
    >>> optimizer_bytes([weight], 32), optimizer_bytes([weight], 8)
    (32772, 10372)
    """
    total = 0
    for each in parameters:
        in_codes = bits == 8 and _in_codes(each)
        moment = each.numel() + each.numel() // _BLOCK * 4 + _TABLE_BYTES if in_codes else each.nbytes
        total += 2 * moment + 4  # and the number of steps, float32
    return total


def _in_codes(value: Tensor) -> bool:
    return value.numel() >= _SMALLEST and value.numel() % _BLOCK == 0


def part_in_codes(moment: Tensor, own: DTensor) -> Tensor:
    """This process's part of a whole 8-bit moment of ``own``, in codes where ``own`` is shared out so."""
    if not _shared_in_codes(own):
        return distribute_tensor(moment.dequantize(), own.device_mesh, own.placements, src_data_rank=None)
    rows = own.to_local().shape[0]
    first = own.device_mesh.get_local_rank() * rows
    return _as_part(moment.to(own.device)[first : first + rows], own)


def _shared_in_codes(own: DTensor) -> bool:
    """Whether every process has as many whole blocks of a parameter as the others."""
    part = own.to_local().numel()
    return _in_codes(own) and part * own.device_mesh.size() == own.numel() and part % _BLOCK == 0


def _as_part(local: Tensor, own: DTensor) -> DTensor:
    return DTensor.from_local(
        local, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def plain_tensors(name: str, value: Any) -> dict[str, Tensor]:
    """What is stored of a tensor of an optimizer's state: of an 8-bit moment its codes, scales and table."""
    if is_traceable_wrapper_subclass(value):
        return {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
    return {name: value}


def joined_tensors(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of one parameter, from what `plain_tensors` made of it."""
    state: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, _, part = key.partition(".")
        if part:
            moments.setdefault(name, {})[part] = value
        else:
            state[name] = value
    for name, parts in moments.items():
        from torchao.optim.subclass_8bit import OptimState8bit

        state[name] = OptimState8bit(**parts, signed=name == "exp_avg", dtype=torch.float32)
    return state


def _adam_8bit() -> Callable[..., torch.optim.Optimizer]:
    from torchao.optim import Adam8bit

    class Adam(Adam8bit):
        """Uncompiled on a CPU."""

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if not isinstance(p, DTensor):
                return super()._new_buffer(p, signed)
            if not _shared_in_codes(p):
                return torch.zeros_like(p)
            return _as_part(self._subclass_zeros(p.to_local(), signed, _BLOCK), p)

        def step(self, closure: Any = None) -> Any:
            on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                return super().step(closure)

    return Adam
