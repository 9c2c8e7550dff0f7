"""Other ways to choose which layers have 8 bits, for the default's one pass of Gauss-Newton to be compared with.

What ``prepare_by`` gives stands where ``fbqat_hub.training.student.prepare_student`` does, in a recipe with
``average_bits``; no choice has more than that average. The student starts at GPTQ's codes, whatever chose its widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.method.baselines import targets_of
from fbqat_hub.quantization import FakeQuantizedLinear, gptq_initialize, named_layers
from fbqat_hub.quantization.sensitivity import rounding_errors, weight_sensitivity
from fbqat_hub.quantization.widths import average_width, widths_of_average
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loss import mean_squared
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.student import set_trained_layers, started_student
from fbqat_hub.training.widths import chosen_widths, layer_scores

# Name of a layer -> its bits.
Widths = dict[str, int]
Chooser = Callable[[Recipe, nn.Module, CachedSplit, Draws], Widths]

# Of learned widths: steps, the rate of the weights, Adam's rate in bits, the share of the steps after which the budget
# is reached, and how fast the multiplier of the budget follows.
LEARNING_STEPS, RATE, RATE_OF_WIDTHS, FALLEN, FOLLOWING = 300, 1e-4, 0.05, 0.7, 0.5


def prepare_by(choose: Chooser) -> Callable[[Recipe, nn.Module, CachedSplit, Draws], Any]:
    """``prepare_student`` with the widths that ``choose`` gives."""

    def prepared(recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Any:
        widths = choose(recipe, teacher, split, draws)
        student = started_student(recipe, teacher, split, draws, {name: 8 for name in widths if widths[name] == 8})
        set_trained_layers(recipe, student)
        return student

    return prepared


def by_weights(recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Widths:
    """The least sum of relative squared errors of weights: what conversion without data does."""
    layers = _float_layers(recipe, teacher)
    scheme = replace(recipe.config().weight_scheme(), clip="mse")
    scores = {
        name: weight_sensitivity(weight, rounding_errors(weight, scheme, (4, 8))) for name, weight in layers.items()
    }
    return widths_of_average(scores, _sizes(layers), _average(recipe))


def by_threshold(recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Widths:
    """SDNQ's rule: 8 bits where the mean squared error of the weight at 4, over its variance, is above a threshold.

    The threshold is the lowest that the average allows; SDNQ's own is 0.01 at 4 bits.
    """
    layers = _float_layers(recipe, teacher)
    scheme = replace(recipe.config().weight_scheme(), clip="max_abs")
    losses = {
        name: float(rounding_errors(weight, scheme, [4])[4].square().mean() / weight.var())
        for name, weight in layers.items()
    }
    return _filled(sorted(losses, key=losses.__getitem__, reverse=True), _sizes(layers), _average(recipe))


def first_and_last(recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Widths:
    """8 bits for the first and the last layer, whatever the average."""
    names = list(_float_layers(recipe, teacher))
    return {name: 8 if name in (names[0], names[-1]) else 4 for name in names}


def as_first_and_last(recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Widths:
    """The default's choice at the average that the first and the last layer at 8 bits come to."""
    sizes = _sizes(_float_layers(recipe, teacher))
    average = average_width(first_and_last(recipe, teacher, split, draws), sizes)
    same = replace(recipe, quantization=replace(recipe.quantization, average_bits=average))
    return chosen_widths(same, started_student(same, teacher, split, draws), teacher, split, draws)


def learned(recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Widths:
    """Each layer's real-valued width is trained with the weights, under a budget that falls from 8 bits to the average.

    The width's gradient is that of ``fake_quantize``. A multiplier for each weight's bit, which rises while the mean
    width is above the budget, pulls all widths down. At the end the widest layers have 8 bits, as many as the average
    allows, and the others 4. What training made of the weights is left: the student starts anew at these widths.
    """
    average = _average(recipe)
    clipped = replace(recipe.quantization, weight_clip="mse")
    start = replace(recipe, initialization="nearest", quantization=clipped)
    student = started_student(start, teacher, split, draws)
    layers = dict(named_layers(student, FakeQuantizedLinear))
    sizes = {name: layer.out_features * layer.in_features for name, layer in layers.items()}
    shares = torch.tensor([size / sum(sizes.values()) for size in sizes.values()])
    widths = nn.Parameter(torch.full((len(layers),), 8.0))
    clips: dict[str, float] = {}
    set_trained_layers(recipe, student)
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    of_weights = torch.optim.Adam(weights, lr=RATE, fused=True)
    of_widths = torch.optim.Adam([widths], lr=RATE_OF_WIDTHS, betas=(0.9, 0.99))
    log_price = math.log(0.1)
    for step in range(LEARNING_STEPS):
        budget = 8 - (8 - average) * min(1.0, step / (FALLEN * LEARNING_STEPS))
        for (name, layer), width in zip(layers.items(), widths, strict=True):
            quarter = round(4 * float(width.detach())) / 4
            if clips.get(name) != quarter:  # found anew, as where a schedule changes the width
                layer.clip.on_width(layer.grouped_weight(), quarter)
                clips[name] = quarter
            layer.bit_width = width  # type: ignore[assignment]  # a tensor, so that it gets a gradient
        loss = _step(recipe, student, teacher, split, draws, step)
        loss.backward()
        assert widths.grad is not None
        # of the logarithm of the loss, for each weight's bit
        widths.grad = widths.grad / loss.detach() / shares + math.exp(log_price)
        of_weights.step()
        of_widths.step()
        of_weights.zero_grad()
        of_widths.zero_grad()
        with torch.no_grad():
            widths.clamp_(4, 8)
            log_price += FOLLOWING * (float((shares * widths).sum()) - budget)
    final = dict(zip(layers, widths.tolist(), strict=True))
    return _filled(sorted(final, key=final.__getitem__, reverse=True), sizes, average)


def prepare_falling(recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Any:
    """As `prepare_student`, but layers fall one by one from 8 bits to 4, those that lose least first.

    A layer that falls gets GPTQ's codes for the inputs that it has by then, and all layers are trained for some steps
    before the next one does: ``recipe.steps`` in all, after which come as many of the common training. In the end the
    same layers have 8 bits as by default.
    """
    uniform = replace(recipe, quantization=replace(recipe.quantization, average_bits=None))
    scores = layer_scores(recipe, started_student(uniform, teacher, split, draws), teacher, split, draws)
    student = started_student(uniform, teacher, split, draws, dict.fromkeys(scores, 8))
    set_trained_layers(recipe, student)
    layers = dict(named_layers(student, FakeQuantizedLinear))
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    final = widths_of_average(scores, sizes, _average(recipe))
    falling = [name for name in layers if final[name] == 4]
    falling.sort(key=lambda name: (scores[name][4] - scores[name][8]) / sizes[name])
    optimizer = torch.optim.Adam([each for each in student.parameters() if each.requires_grad], lr=RATE)
    options = asdict(recipe.gptq)
    samples, step = options.pop("samples"), 0
    for number, name in enumerate(falling):
        layers[name].weight_scheme = replace(layers[name].weight_scheme, bits=4.0)
        for parameter in layers[name].set_bit_width(4):
            optimizer.state.pop(parameter, None)
        gptq_initialize(student, lambda: draws.calibration(split, samples), only=[name], **options)
        while step < recipe.steps * (number + 1) // len(falling):
            _step(recipe, student, teacher, split, draws, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return student


def _step(
    recipe: Recipe, student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws, step: int
) -> Tensor:
    """The loss of a training step."""
    inputs = draws.training(split, step, recipe.batch_size)
    with torch.no_grad():
        target = draws.predict(teacher, inputs)
    weight = draws.error_weight(inputs) if recipe.loss_weighting == "sampler" else None
    return mean_squared(draws.predict(student, inputs).float(), target.float(), weight)


def _filled(order: Iterable[str], sizes: Mapping[str, int], average: float) -> Widths:
    """8 bits for the first layers of ``order``, and for later ones that still fit into the average."""
    widths = dict.fromkeys(sizes, 4)
    for name in order:
        if average_width(widths | {name: 8}, sizes) <= average * (1 + 1e-12):
            widths[name] = 8
    return widths


def _average(recipe: Recipe) -> float:
    average = recipe.quantization.average_bits
    if average is None:
        raise ValueError("quantization.average_bits is not given; every layer has weight_bits.")
    return average


def _float_layers(recipe: Recipe, teacher: nn.Module) -> dict[str, Tensor]:
    """Name -> fp32 weight [out, in] of every layer that is quantized, in order."""
    return {each.names[0]: each.layer.weight.detach().float().flatten(1) for each in targets_of(recipe, teacher)}


def _sizes(layers: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: weight.numel() for name, weight in layers.items()}


CHOICES: dict[str, Chooser] = {
    "by weights": by_weights,
    "by SDNQ's threshold": by_threshold,
    "first and last": first_and_last,
    "as first and last": as_first_and_last,
    "learned widths": learned,
}
