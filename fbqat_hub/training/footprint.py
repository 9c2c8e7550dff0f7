"""Memory of a training step from configs alone: the step is run on tensors that have shapes and no numbers.

torch's fake tensors go through the same operators, autocast and checkpointing as real ones; every storage counts from
the operator that makes it until it is freed. What an operator takes for itself is not seen, nor what an
allocator loses.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fbqat_hub.families import get_family
from fbqat_hub.quantization import FakeQuantizedLinear, Rounding, named_layers, prepare
from fbqat_hub.quantization.clip import CLIPS
from fbqat_hub.training.adam import optimizer_bytes
from fbqat_hub.training.bases import Configs, build, build_on_meta
from fbqat_hub.training.loss import mean_squared
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.student import narrow_teacher, set_trained_layers, tensors_of, with_same_tensors


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the moment of a step at which most is in use, from the second step on.

    Attributes:
        teacher: its layers that are quantized in the student, in the precision of the run.
        student: what is trained, in float32, with the scales.
        frozen: of the student, what is not trained; the teacher has the same tensors where they are not quantized.
        gradients: those that are there at that moment.
        optimizer: Adam's two moments, in 32 bits or 8.
        activations: of teacher and student, what autograd keeps and what operators leave on the way, and the batch.
        trained: how many numbers are trained.
    """

    teacher: int
    student: int
    frozen: int
    gradients: int
    optimizer: int
    activations: int
    trained: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(value for name, value in dataclasses.asdict(self).items() if name != "trained")


def step_memory(recipe: Recipe, configs: Configs, batch_size: int | None = None) -> StepMemory:
    """What a step of the recipe takes on one device.

    Args:
        configs: of the teacher's models, "transformer" and "vae" among them.
        batch_size: instead of the recipe's, all at once.
    """
    at_once = batch_size or recipe.micro_batch_size or recipe.batch_size
    added_up = not batch_size and at_once < recipe.batch_size
    key = _key(recipe, configs, at_once, added_up)
    if key not in _TRACED:
        _TRACED[key] = _traced(recipe, configs, at_once, added_up)
    memory, stepped = _TRACED[key]
    return replace(memory, optimizer=optimizer_bytes(stepped, recipe.optimizer.moment_bits))


# What was traced in this process: each takes seconds, and advice asks for the same ones again.
_TRACED: dict[str, tuple[StepMemory, list[nn.Parameter]]] = {}


def _key(recipe: Recipe, configs: Configs, at_once: int, added_up: bool) -> str:
    """Of what a step is traced of: of all settings but those that change its batch, given here, or its moments."""
    fields = recipe.to_dict()
    for name in ("batch_size", "micro_batch_size"):
        del fields[name]
    del fields["optimizer"]["moment_bits"]
    return json.dumps([fields, configs, at_once, added_up], sort_keys=True, default=str)


def _traced(recipe: Recipe, configs: Configs, at_once: int, added_up: bool) -> tuple[StepMemory, list[nn.Parameter]]:
    """`step_memory` without the optimizer's, and the parameters that get a gradient, without numbers.

    Args:
        at_once: samples.
        added_up: whether gradients of samples before them are there.
    """
    family = get_family(recipe.family)
    inputs = denoiser_arguments(recipe, configs, at_once)
    with FakeTensorMode() as fake, Storages() as storages:
        teacher = build(configs["transformer"]).eval().requires_grad_(False)
        student = fake_student(recipe, teacher).train()
        narrow_teacher(recipe, teacher, student)
        of_teacher = sum(each.nbytes for each in {*tensors_of(teacher)} - {*tensors_of(student)})
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        weights, trained_bytes = storages.bytes, sum(parameter.nbytes for parameter in trained)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(storages.gradient)
        if added_up:  # a part of a batch after the first, which left gradients
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                storages.gradient(parameter)
        storages.peak = storages.gradients_at_peak = 0
        inputs = tree_map(lambda value: fake.from_tensor(value).clone() if isinstance(value, Tensor) else value, inputs)
        with torch.autocast("cpu", recipe.half, enabled=recipe.half is not None):
            with torch.no_grad():
                target = family.predict(teacher, inputs)
            made = family.predict(student, inputs)
        mean_squared(made.float(), target.float(), None).backward()
        peak, gradients = storages.peak, storages.gradients_at_peak
        stepped = [parameter for parameter in trained if parameter.grad is not None]
    memory = StepMemory(
        teacher=of_teacher,
        student=trained_bytes,
        frozen=weights - of_teacher - trained_bytes,
        gradients=gradients,
        optimizer=0,
        activations=peak - weights - gradients,
        trained=sum(parameter.numel() for parameter in trained),
    )
    return memory, [nn.Parameter(torch.empty(each.shape, dtype=each.dtype, device="meta")) for each in stepped]


def fake_student(recipe: Recipe, teacher: nn.Module) -> Any:
    """As `prepare_student` makes it, but for the numbers: no clip is searched."""
    config = recipe.config()
    mode = tensors_of(teacher)[0].fake_mode  # type: ignore[attr-defined]  # a module's other tensors would copy it
    student = with_same_tensors(teacher, mode)
    prepare(student, replace(config.weight_scheme(), clip="max_abs"), **config.layer_options())
    if recipe.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    for _, layer in named_layers(student, FakeQuantizedLinear):
        layer.clip = CLIPS[recipe.quantization.weight_clip](layer.grouped_weight())
        layer.weight_scheme, layer.rounding = config.weight_scheme(), Rounding(recipe.optimizer.ewgs)
        if layer.activation_scheme.range == "static":
            layer.set_input_range(1.0, 0)
    set_trained_layers(recipe, student)
    return student


def denoiser_arguments(recipe: Recipe, configs: Configs, batch_size: int) -> dict[str, Any]:
    """Arguments of the denoiser's forward in a step of the recipe: zeros, which take no memory where they are repeated.

    Args:
        configs: of the teacher's models, "transformer" and "vae" among them.
    """
    family = get_family(recipe.family)
    whole: Mapping[str, Any] = {name: build_on_meta(configs[name]).config for name in ("transformer", "vae")}
    latents = _zeros((batch_size, *family.latent_shape(whole, recipe.size)))
    shapes = family.conditioning_shapes(whole["transformer"], recipe.generation)
    conditioning = {
        name: torch.ones(batch_size, *shape, dtype=torch.long)
        if name.endswith("_mask")
        else _zeros((batch_size, *shape))
        for name, shape in shapes.items()
    }
    conditioning |= family.picture_conditioning(latents)
    return family.denoiser_inputs(latents, torch.ones(batch_size), conditioning)


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(1).expand(shape)


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.gradients = self.gradients_at_peak = 0
        self._whole: set[int] = set()
        self._known: dict[int, weakref.ref[Any]] = {}

    def gradient(self, parameter: nn.Parameter) -> None:
        """A hook: the parameter's gradient is whole."""
        if id(parameter) not in self._whole:
            self._whole.add(id(parameter))
            self.gradients += parameter.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return made

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        if self.bytes > self.peak:
            self.peak, self.gradients_at_peak = self.bytes, self.gradients
