"""Baselines by others: SVDQuant and QAT beside an SVD branch; torchao's own QAT is in ``torchao_qat``.

Each ``prepare_...`` stands where ``fbqat_hub.training.distill.prepare_student`` does: it returns a copy of the teacher
whose every linear layer and 1x1 convolution is quantized with the recipe's bits and activation scheme.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbqat_hub.families import get_family
from fbqat_hub.quantization import ActivationScheme, FakeQuantizedLinear, WeightScheme, calibrate
from fbqat_hub.quantization.convert import Target, matches, observed_inputs, targets
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.seeding import generator

# (alpha, beta) of smoothing: none, by the activations alone, or shared with the weight. These are the ten-step grid of
# deepcompressor's SVDQuant (examples/diffusion/configs/svdquant: alpha 0.5, beta -2, num_grids 10).
SMOOTHINGS = ((0.0, 0.0), *((step / 10, beta) for step in range(1, 10) for beta in (0.0, 1 - step / 10)))
# deepcompressor's limit; the search stops at the first round that does not help.
ROUNDS = 100
# Calibration tokens kept of each layer, over all samples.
TOKENS = 2048


class LowRankLinear(nn.Module):
    """A fake-quantized linear layer beside a low-rank branch in float: [..., in] -> [..., out].

    y = residual(x / s) + up @ down @ (x / s), where residual.weight + up @ down is the layer's weight times s. The
    branch sees activations that are not quantized. It starts at values of float16, which is how it would be stored.

    Attributes:
        residual: what the branch leaves of the weight, quantized, and the bias.
        down, up: fp32 parameters [rank, in] and [out, rank].
        smoothing: s, fp32 buffer [in] of values of float16, or None for 1.
    """

    smoothing: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        weights: WeightScheme,
        activations: ActivationScheme,
        rank: int,
        smoothing: Tensor | None = None,
        quantized: Tensor | None = None,
    ) -> None:
        """The branch is the best of its rank for the smoothed weight less ``quantized`` [out, in] (0 if None)."""
        super().__init__()
        smoothed = linear.weight.detach().float() * (1 if smoothing is None else smoothing)
        u, s, vh = torch.linalg.svd(smoothed if quantized is None else smoothed - quantized, full_matrices=False)
        root = s[:rank].sqrt()
        self.down = nn.Parameter((root[:, None] * vh[:rank]).half().float())
        self.up = nn.Parameter((u[:, :rank] * root).half().float())
        self.register_buffer("smoothing", smoothing)
        self.residual = FakeQuantizedLinear(
            _linear(smoothed - self.up.detach() @ self.down.detach(), linear.bias), weights, activations
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.smoothing is not None:
            x = x / self.smoothing.to(x.dtype)
        branch = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        output: Tensor = self.residual(x) + branch
        return output


class Pointwise(nn.Module):
    """A layer of tokens as a 1x1 convolution: [N, in, H, W] -> [N, out, H, W]."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x.movedim(1, -1)).movedim(-1, 1)
        return output


def prepare_low_rank(
    recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws, *, rank: int, train: bool
) -> nn.Module:
    """A student with a low-rank branch beside every quantized layer.

    Without training it is SVDQuant (arXiv 2411.05007) as its deepcompressor does it: per layer, smoothing by grid
    search, then low-rank branch and quantized residual in turns, each judged by the error of the layer's output on
    the recipe's calibration samples. The clip is the MSE one, whatever the recipe's; nothing is trainable. Unlike
    there, every layer has its own branch, no layer is left in float, and GPTQ is not used.

    With training it is the SVDQAT of arXiv 2510.14823: the SVD of the weight as it is, then residual and branch of
    the recipe's layers are trained. The clip is the recipe's ("max_abs" as published: method "vqat").

    Args:
        rank: of every branch; a layer with a smaller side has that as its rank.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1 (without a branch the methods are ptq-mse and vqat).")
    weights = recipe.config().weight_scheme()
    if train:
        return student_of(
            recipe, teacher, train_split, draws, lambda _, linear, scheme: LowRankLinear(linear, weights, scheme, rank)
        )
    weights = replace(weights, clip="mse")
    tokens, largest = _layer_inputs(recipe, teacher, train_split, draws)

    ranges = {key: value for key, value in asdict(recipe.calibration).items() if key != "samples"}

    def search(name: str, linear: nn.Linear, scheme: ActivationScheme) -> LowRankLinear:
        return svdquant(linear, weights, scheme, rank, tokens.pop(name), largest[name], ranges)

    return student_of(recipe, teacher, train_split, draws, search).requires_grad_(False)


@torch.no_grad()
def svdquant(
    linear: nn.Linear,
    weights: WeightScheme,
    activations: ActivationScheme,
    rank: int,
    tokens: Tensor,
    largest: Tensor,
    range_options: Mapping[str, Any] | None = None,
) -> LowRankLinear:
    """The low-rank layer with the least squared error of its output that SVDQuant's search finds.

    Args:
        tokens: fp32 [n, in], inputs of the layer.
        largest: fp32 [in], the largest magnitude of each input.
        range_options: arguments of ``calibrate``, for a static activation range.
    """
    expected = linear(tokens)

    def attempt(smoothing: Tensor, quantized: Tensor | None) -> tuple[float, LowRankLinear]:
        layer = LowRankLinear(linear, weights, activations, rank, smoothing, quantized)
        if activations.range == "static":
            calibrate(layer, [{"x": tokens}], **(range_options or {}))
        return float((layer(tokens) - expected).square().sum()), layer

    error, best = min(
        (attempt(_smoothing(largest, linear.weight, alpha, beta), None) for alpha, beta in SMOOTHINGS),
        key=lambda pair: pair[0],
    )
    for _ in range(ROUNDS):
        assert best.smoothing is not None
        next_error, layer = attempt(best.smoothing, best.residual.fake_quantized_weight())
        if next_error >= error:
            break
        error, best = next_error, layer
    return best


def student_of(
    recipe: Recipe,
    teacher: nn.Module,
    train_split: CachedSplit,
    draws: Draws,
    make: Callable[[str, nn.Linear, ActivationScheme], nn.Module],
) -> nn.Module:
    """As ``prepare_student``, with the layers that ``make`` makes.

    Args:
        make: from a layer's name, the layer in fp32 (a 1x1 convolution as a linear one) and its activation scheme.
    """
    config = recipe.config()
    trained = get_family(recipe.family).layer_groups[recipe.train_layers]
    student = copy.deepcopy(teacher).to(draws.device).requires_grad_(False)
    for layer, names, scheme, _ in targets_of(recipe, student):
        made = make(names[0], _linear(layer.weight, layer.bias), scheme)
        made = Pointwise(made) if isinstance(layer, nn.Conv2d) else made
        for name in names:
            student.set_submodule(name, made.requires_grad_(matches(name, trained)))
    if config.needs_calibration:
        options = asdict(recipe.calibration)
        calibrate(student, draws.calibration(train_split, options.pop("samples")), **options)
    return student


def bits_per_weight(student: nn.Module) -> float:
    """Stored bits of a student's quantized layers over the number of their weights; biases are not counted.

    Codes take 4 bits, or 8 above that, and scales are float32, as docs/format.md stores them; branches and smoothing
    are float16.

    Args:
        student: a prepared model, at its final width.

    Raises:
        ValueError: a model with no quantized layer.
    """
    stored = weights = 0
    for layer in student.modules():
        if isinstance(layer, FakeQuantizedLinear):  # a branch's residual among them
            codes, scale = layer.codes_and_scales()
            stored += (4 if layer.bit_width <= 4 else 8) * codes.numel() + 32 * scale.numel()
            weights += codes.numel()
        elif isinstance(layer, LowRankLinear):
            smoothing = 0 if layer.smoothing is None else layer.smoothing.numel()
            stored += 16 * (layer.down.numel() + layer.up.numel() + smoothing)
        elif isinstance(layer, nn.Linear) and hasattr(layer, "weight_fake_quantizer"):  # torchao's, not imported here
            quantizer: Any = layer.weight_fake_quantizer
            group_size = getattr(quantizer.config.granularity, "group_size", layer.in_features)
            stored += layer.weight.numel() * 4 + layer.weight.numel() // group_size * 32
            weights += layer.weight.numel()
    if not weights:
        raise ValueError("the model has no quantized layer; prepare it first.")
    return stored / weights


def targets_of(recipe: Recipe, model: nn.Module) -> list[Target]:
    """The layers of a float model that a recipe quantizes, in order."""
    return targets(model, **recipe.config().layer_options())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The fp32 linear layer of a weight [out, in] or [out, in, 1, 1]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().float().flatten(1).clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float().clone())
    return linear


def _smoothing(largest: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """max|x|^alpha / max|w|^beta of each input, as SmoothQuant (arXiv 2211.10438, eq. 4); 1 where that is no number."""
    smoothing = largest**alpha / weight.abs().amax(0) ** beta
    smoothing = smoothing.half().float()
    return torch.where(smoothing.isfinite() & (smoothing > 0), smoothing, 1.0)


@torch.no_grad()
def _layer_inputs(
    recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each layer to quantize, on the float model's calibration samples: random tokens [n, in], and max|x| [in]."""
    teacher = teacher.to(draws.device)
    layers = {target.names[0]: target.layer for target in targets_of(recipe, teacher)}
    samples = recipe.calibration.samples
    random = generator(recipe.seed, "calibration tokens")
    kept: dict[str, list[Tensor]] = {}
    largest: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor) -> None:
        tokens = (x.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else x).flatten(0, -2).float()
        most = tokens.abs().amax(0)
        largest[name] = torch.maximum(largest.get(name, most), most)
        chosen = torch.randperm(len(tokens), generator=random)[: math.ceil(TOKENS / samples)]
        kept.setdefault(name, []).append(tokens[chosen.to(tokens.device)])

    with observed_inputs(layers, observe):
        for batch in draws.calibration(train_split, samples):
            teacher(**batch)
    return {name: torch.cat(tokens) for name, tokens in kept.items()}, largest
