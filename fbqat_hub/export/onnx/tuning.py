"""Train a QDQ graph as it is deployed: its static ranges, scales and biases, towards a teacher's output.

The graph is computed in torch with the arithmetic that ships (`fake_quantized`), the loss is the squared distance to
what the float teacher predicts for the same inputs, and the result is the same graph with other numbers in it: what was
trained is what is compiled, and nothing is calibrated afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.fake_quantized import FakeQuantizedGraph
from fbqat_hub.export.onnx.parity import compare
from fbqat_hub.families.graph import TWIN, GraphWrapper, Item
from fbqat_hub.progress import Progress
from fbqat_hub.quantization.packed import PackedLayer

#: Samples a step.
BATCH = 8
#: Samples on which the loss before and after is measured: those behind the samples of all steps.
APART = 32
#: Adam's learning rates of the parameters of `FakeQuantizedGraph`; they fall to 0 by a cosine.
LEARNING_RATES = {"scales": 1e-2, "zero_points": 1e-3, "row_scales": 1e-3, "biases": 1e-2}
_WARM_UP = 10


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a graph is tuned.

    Attributes:
        steps: of Adam, of `BATCH` samples each.
        seed: that `draw` draws with, for the record.
        draw: number -> keyword arguments of the denoiser's forward, batch 1, the same for the same number.
        teacher: the float denoiser.
    """

    steps: int
    seed: int
    draw: Callable[[int], Item]
    teacher: nn.Module

    @torch.no_grad()
    def predicted(self, item: Item) -> Tensor:
        """The teacher's output, float32."""
        output: Tensor = self.teacher(**item, return_dict=False)[0]
        return output.float()


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A graph that was tuned.

    Attributes:
        model: the QDQ graph with what was learned.
        layers: copies of the packed layers with the scales and static ranges that were learned, by module name.
        outputs: for each held-out input, what torch computes of the tuned graph (`torch_tuned`) and what the teacher
            predicts (`teacher`).
        report: for the certificate.
    """

    model: onnx.ModelProto
    layers: dict[str, PackedLayer]
    outputs: dict[str, list[np.ndarray]]
    report: dict[str, Any]


def stacked(feeds: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Graph inputs of several samples as one feed of `FakeQuantizedGraph`."""
    return {name: torch.stack([feed[name] for feed in feeds]) for name in feeds[0]}


@torch.no_grad()
def computed(module: FakeQuantizedGraph, wrapper: GraphWrapper, items: Sequence[Item]) -> list[np.ndarray]:
    """What `module` computes of each item, as the graph has it."""
    return [module(stacked([wrapper.host_inputs(item)]))[wrapper.output_name][0].numpy() for item in items]


def tune_graph(
    model: onnx.ModelProto,
    *,
    layers: Mapping[str, PackedLayer],
    tuning: Tuning,
    wrapper: GraphWrapper,
    held_out: Sequence[Item],
    packed: Sequence[np.ndarray],
    progress: bool = True,
) -> Tuned:
    """A denoiser's QDQ graph after `tuning`, and how far it then is from everything it can be compared with.

    Args:
        layers: its packed layers by module name; not changed.
        wrapper: of the graph.
        held_out: inputs to compare on, which nothing is trained on.
        packed: what the packed model computes of them in torch.
        progress: show a bar.

    Raises:
        ExportError: an op that has no form in torch, or a loss that is not finite.
    """
    module = FakeQuantizedGraph(model)

    teacher = [tuning.predicted(item).numpy() for item in held_out]
    untuned = computed(module, wrapper, held_out)
    report = train(module, tuning, wrapper, progress)
    tuned = computed(module, wrapper, held_out)
    report |= {
        "torch_is": "the tuned graph, computed in torch as it was trained; the packed model is what it started from",
        "untuned_vs_teacher": compare(teacher, untuned),
        "tuned_vs_teacher": compare(teacher, tuned),
        "torch_packed_vs_teacher": compare(teacher, packed),
    }
    return Tuned(
        model=module.to_onnx(),
        layers={name: _learned(module, name, layer) for name, layer in layers.items()},
        outputs={"torch_tuned": tuned, "teacher": teacher},
        report=report,
    )


def train(module: FakeQuantizedGraph, tuning: Tuning, wrapper: GraphWrapper, progress: bool = True) -> dict[str, Any]:
    """Train `module` in place; returns steps, seed, rates and the loss before and after on samples kept apart."""
    groups = [
        {"params": [value for name, value in module.named_parameters() if name.split(".")[0] == kind], "lr": rate}
        for kind, rate in LEARNING_RATES.items()
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, tuning.steps))

    def loss_of(first: int) -> Tensor:
        items = [tuning.draw(number) for number in range(first, first + BATCH)]
        made = module(stacked([wrapper.host_inputs(item) for item in items]))[wrapper.output_name]
        return nn.functional.mse_loss(made, torch.stack([tuning.predicted(item) for item in items]))

    @torch.no_grad()
    def loss_apart() -> float:
        behind = tuning.steps * BATCH
        losses = [float(loss_of(first)) for first in range(behind, behind + APART, BATCH)]
        return sum(losses) / len(losses)

    before = loss_apart()
    with Progress("tune", tuning.steps, "step", shown=progress) as bar:
        for step in range(tuning.steps):
            loss = loss_of(step * BATCH)
            if not torch.isfinite(loss):
                raise ExportError(f"the loss of tuning step {step + 1} is {loss.item()}; are all inputs finite?")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(loss=f"{loss.item():.2e}")
    module.requires_grad_(False)
    return {
        "steps": tuning.steps,
        "batch": BATCH,
        "seed": tuning.seed,
        "learning_rates": LEARNING_RATES,
        "loss_before": before,
        "loss_after": loss_apart(),
        "loss_samples": APART,
    }


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: a warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _codes(layer: str) -> str:
    """What the graph calls the codes of a packed layer."""
    return f"{TWIN}.{layer}.weight/codes"


@torch.no_grad()
def _learned(module: FakeQuantizedGraph, name: str, layer: PackedLayer) -> PackedLayer:
    """A copy of `layer` with what `module` learned for it."""
    learned = copy.deepcopy(layer)
    learned.weight_scale.copy_(module.scale_of(_codes(name)))
    if learned.input_scale is not None and learned.input_zero_point is not None:
        encoding = module.input_encoding(_codes(name))
        learned.input_scale.fill_(encoding.scale)
        learned.input_zero_point.fill_(encoding.zero_point)
    return learned
