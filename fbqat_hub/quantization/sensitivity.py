"""How much each layer's width matters: the expected squared error of the model's output when one weight moves.

With J the derivative of the outputs by a layer's weight, moving the weight by D moves the outputs by J D, and the
squared error is E ||J D||^2 = D^T E[J^T J] D: Gauss-Newton, which needs the teacher only and no target. For random
signs r over the outputs, E (r . J D)^2 = ||J D||^2 (Hutchinson), and r . J D is what one backward pass from r gives,
for every layer and every D at once: the sum over tokens t of g_t^T D x_t, with x_t the layer's input and g_t the
gradient at its output.

A layer's score at b bits is that error, a mean over the outputs, for D = (the weight at b bits) - (the weight). Scores
of different layers add up as far as their errors are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.clip import CLIPS
from fbqat_hub.quantization.fake_quantize import fake_quantize
from fbqat_hub.quantization.linear import FakeQuantizedPointwiseConv2d
from fbqat_hub.quantization.quantize import grouped
from fbqat_hub.quantization.scheme import WeightScheme

# Bytes of weight errors that are held at a time.
_WEIGHT_ERRORS = 2**31
# layer -> bit width -> score; as `widths.choose_widths` takes them
Scores = dict[str, dict[int, float]]
# layer -> what gives, for each width, the weight there less the weight: [out, in] or [out, in, 1, 1]
WeightErrors = Mapping[str, Callable[[], Mapping[int, Tensor]]]
# the same of a layer's name and its weight in float, on the weight's device
ErrorsOf = Callable[[str, Tensor], Mapping[int, Tensor]]


def output_sensitivity(
    model: nn.Module,
    errors: WeightErrors,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    predict: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    *,
    signs: int = 4,
    seed: int = 0,
    max_bytes: int = _WEIGHT_ERRORS,
) -> Scores:
    """The expected mean squared error of the model's output for each layer at each width.

    The memory is that of a training step without gradients of weights, plus the weight errors of ``max_bytes`` worth of
    layers at a time; a model that checkpoints its gradients does so here too.

    Args:
        model: with all its layers in float (of a prepared model, within ``quantization_disabled``).
        errors: of the layers to score. Each is asked for once.
        batches: gives what ``predict`` takes, the same at every call. It is called once for each set of layers. One
            sample a batch has the least noise: the standard error of a score is about sqrt(2 / (samples x signs)) of
            it, and the spread of the samples.
        predict: the output of the model whose squared error counts, any shape.
        signs: backward passes for each batch.
        seed: of the random signs.
        max_bytes: of weight errors held at a time.

    Raises:
        ValueError: no layer, a layer that is not there or that no batch reached, or an error of another shape than its
            weight.
    """
    if not errors:
        raise ValueError("no layers to score; name at least one.")
    if signs < 1:
        raise ValueError(f"signs is {signs}; it must be at least 1.")
    scores: Scores = {}
    with frozen(model):
        for held in _chunks(model, errors, max_bytes):
            scores |= _score(model, held, batches(), predict, signs, torch.Generator().manual_seed(seed))
    return scores


@torch.no_grad()
def weight_sensitivity(weight: Tensor, errors: Mapping[int, Tensor]) -> dict[int, float]:
    """A layer's scores where there is no data: the squared error of its weight as a share of the weight's square.

    It is what the layer's outputs lose if its inputs are uncorrelated, and takes every layer to matter as much to the
    model. It is weaker than ``output_sensitivity``, which knows both (docs/method.md says by how much).

    Args:
        weight: of any shape.
        errors: width -> the weight there less the weight.
    """
    size = float(weight.float().square().sum()) or 1.0  # a weight of zeros has no error
    return {bits: float(error.float().square().sum()) / size for bits, error in errors.items()}


@torch.no_grad()
def rounding_errors(
    weight: Tensor, scheme: WeightScheme, widths: Iterable[int], clips: dict[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """For each width, the weight rounded to its nearest codes there less the weight: fp32 [out, in].

    Args:
        weight: [out, in], or [out, in, 1, 1] of a 1x1 convolution.
        scheme: what shares a scale, and how its clip is found.
        clips: of each width, where they are known; those that are not are put there.

    Raises:
        ValueError: a group size that does not suit the weight.
    """
    rows, clips = grouped(weight, scheme), {} if clips is None else clips
    errors = {}
    for bits in widths:
        if bits not in clips:
            clip = CLIPS[scheme.clip](rows)
            clip.on_width(rows, bits)
            clips[bits] = clip.value(rows, bits)
        errors[bits] = (fake_quantize(rows, clips[bits], bits) - rows).reshape(weight.shape[:2])
    return errors


def nearest_errors(scheme: WeightScheme, widths: Iterable[int]) -> ErrorsOf:
    """`rounding_errors`; of each layer a clip is found once for each width, and kept."""
    clips: dict[str, dict[int, Tensor]] = {}
    return lambda name, weight: rounding_errors(weight, scheme, widths, clips.setdefault(name, {}))


def _score(
    model: nn.Module,
    held: Mapping[str, Mapping[int, Tensor]],
    batches: Iterable[Mapping[str, Any]],
    predict: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    signs: int,
    random: torch.Generator,
) -> Scores:
    sums: Scores = {name: dict.fromkeys(by_width, 0.0) for name, by_width in held.items()}
    moved: dict[str, dict[int, Tensor | float]] = {}

    def record(name: str, x: Tensor, grad: Tensor) -> None:
        gradient = grad.float().T @ x.float()  # of the weight, [out, in]
        own = moved.setdefault(name, dict.fromkeys(held[name], 0.0))
        for bits, error in held[name].items():
            own[bits] = own[bits] + (gradient * error.to(gradient.device)).sum()

    elements = 0
    called: set[str] = set()  # a layer of them without effect on the output, as the last block's text, loses nothing
    with recorded(model, held, record, called.add):
        for batch in batches:
            with torch.enable_grad():
                output = predict(model, batch)
            elements += output.numel()
            for left in reversed(range(signs if output.requires_grad else 0)):
                moved.clear()
                sign = 2.0 * torch.randint(0, 2, output.shape, generator=random) - 1
                output.backward(sign.to(output), retain_graph=left > 0)
                for name, by_width in moved.items():
                    for bits, value in by_width.items():
                        sums[name][bits] += float(value) ** 2
    if not elements:
        raise ValueError("no batches to score the layers with; give at least one.")
    if missed := [name for name in held if name not in called]:
        raise ValueError(f"the output does not depend on {missed[0]}; give batches that run through the whole model.")
    return {
        name: {bits: value / (elements * signs) for bits, value in by_width.items()} for name, by_width in sums.items()
    }


class _Recorded(torch.autograd.Function):
    """The identity of a layer's output; on the way back the layer's input and the gradient are shown to ``record``.

    The input is a saved tensor, so that gradient checkpointing drops it and computes it again.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, record: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.record(x, grad)
        return grad, None, None, None


@contextmanager
def recorded(
    model: nn.Module,
    names: Iterable[str],
    record: Callable[[str, Tensor, Tensor], None],
    called: Callable[[str], None],
) -> Iterator[None]:
    """Within, a forward calls ``called(name)`` of each layer that it comes to, and a backward pass ``record(name, input
    [tokens, in], gradient of the output [tokens, out])``."""
    anchor = torch.zeros((), requires_grad=True)  # or the output of a first layer would have no gradient

    def watch(name: str, layer: nn.Module) -> Any:
        pointwise = isinstance(layer, nn.Conv2d | FakeQuantizedPointwiseConv2d)

        def rows(tensor: Tensor) -> Tensor:
            tensor = tensor.movedim(-3, -1) if pointwise else tensor
            return tensor.reshape(-1, tensor.shape[-1])

        def show(x: Tensor, grad: Tensor) -> None:
            record(name, rows(x), rows(grad))

        def seen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            called(name)
            return _Recorded.apply(output, inputs[0].detach(), anchor, show)

        return layer.register_forward_hook(seen)

    with ExitStack() as stack:
        for name in names:
            stack.callback(watch(name, model.get_submodule(name)).remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, no parameter asks for a gradient: only what flows from layer to layer is computed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _chunks(model: nn.Module, errors: WeightErrors, max_bytes: int) -> Iterator[dict[str, dict[int, Tensor]]]:
    """The errors of as many layers as ``max_bytes`` hold, at least of one."""
    chunk: dict[str, dict[int, Tensor]] = {}
    size = 0
    for name, give in errors.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        own = {bits: error.detach().flatten(1) for bits, error in give().items()}
        for bits, error in own.items():
            if error.shape != weight.shape[:2]:
                raise ValueError(
                    f"the error of {name} at {bits} bits is {list(error.shape)}; its weight {list(weight.shape)}."
                )
        needed = sum(error.nbytes for error in own.values())
        if chunk and size + needed > max_bytes:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = own
        size += needed
    yield chunk
