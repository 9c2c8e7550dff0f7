"""GPTQ initialisation: training starts from, or without training ends at, codes whose rounding errors cancel out.

Rounding each weight to its nearest code is best for the weight, not for what the layer computes: inputs are
correlated, so the error of one weight can undo that of another. GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323)
rounds a row from left to right and spreads each error over the weights still to come, by the inverse of the inputs'
second moments H = E[x x^T]. Training then starts from a layer that computes nearly the right thing, instead of
spending its steps on finding such codes by flipping one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.convert import named_layers, observed_inputs, quantization_disabled, run_batches
from fbqat_hub.quantization.fake_quantize import grid, symmetric_scale
from fbqat_hub.quantization.linear import FakeQuantizedLinear, FakeQuantizedPointwiseConv2d

# Rows rounded before the rest hears of their errors, in one matrix product.
_BLOCK = 64

# Layers that have one weight, by name: mostly one.
_Layers = dict[str, FakeQuantizedLinear]


@torch.no_grad()
def gptq_initialize(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    *,
    damping: float = 0.01,
    margin: float = 0.05,
    max_bytes: int = 2**31,
    run: Callable[[nn.Module, Iterable[Any]], None] = run_batches,
    only: Container[str] | None = None,
) -> dict[str, float]:
    """Move every latent weight of a prepared model into the bin of its GPTQ code.

    A weight whose GPTQ code is its nearest one stays where it is (but ``margin`` from the edge); the others go to the
    near edge of their new bin, so that training can still take them back. Scales stay as they are. A weight that
    several layers share is rounded for the inputs of all, on the grid of the first.

    Args:
        model: a prepared model, at the bit width to start from.
        batches: gives what ``run`` takes, by default keyword arguments of ``model.forward``, the same at every call.
            It is called once for each set of layers whose second moments fit into ``max_bytes``; the result does not
            depend on it.
        damping: added to the diagonal of H, as a share of its mean.
        margin: how far inside its bin a weight is put, in steps.
        max_bytes: of second moments held at a time, fp32. Beside them a byte per weight is held.
        run: runs the model on all batches.
        only: names of the layers to initialise; None for all.

    Returns:
        name -> the layer's expected squared output error as a share of that of nearest rounding.

    Raises:
        ValueError: nothing to initialise, a margin out of range, a layer that no batch reached, or one whose moments
            cannot be inverted with this damping.
    """
    if not 0 <= margin <= 0.5:
        raise ValueError(f"margin is {margin}; it must be within 0 and 0.5, half a bin.")
    by_weight: dict[nn.Parameter, _Layers] = {}
    for name, layer in named_layers(model, FakeQuantizedLinear):
        if only is None or name in only:
            by_weight.setdefault(layer.weight, {})[name] = layer
    if not by_weight:
        raise ValueError("the model has no fake-quantized layer; prepare it first.")
    found: list[Tensor] = []
    ratios: dict[str, float] = {}
    for chunk in _chunks(list(by_weight.values()), max_bytes):
        moments = _second_moments(model, chunk, lambda: run(model, batches()))
        for layers in chunk:
            name, layer = next(iter(layers.items()))
            codes, ratio = _codes(name, layer, moments.pop(name), damping)
            found.append(codes)
            ratios |= dict.fromkeys(layers, ratio)
    # only now: the moments of a later chunk are of the float model as well
    for layers, codes in zip(by_weight.values(), found, strict=True):
        move_to_codes(next(iter(layers.values())), codes, margin)
    return ratios


def gptq_codes(weight: Tensor, scale: Tensor, inverse_root: Tensor, low: float, high: float) -> Tensor:
    """GPTQ's codes, fp32 whole numbers [out, in].

    Args:
        weight, scale: [out, in], fp32.
        inverse_root: the upper Cholesky factor of the inverse of H, [in, in].
        low, high: the smallest and largest code.

    >>> w, ones = torch.tensor([[0.4, 1.3]]), torch.ones(1, 2)
    >>> gptq_codes(w, ones, torch.eye(2), -8, 7)          # uncorrelated inputs: the nearest codes
    tensor([[0., 1.]])
    >>> h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])       # 0.4 is lost, and 0.9 * 0.4 of it the second weight can give
    >>> gptq_codes(w, ones, torch.linalg.cholesky(torch.linalg.inv(h), upper=True), -8, 7)
    tensor([[0., 2.]])
    """
    # transposed, so that what is worked on together lies together
    rest, steps = weight.T.contiguous(), scale.T.contiguous()
    codes = torch.empty_like(rest)
    for first in range(0, len(rest), _BLOCK):
        last = min(first + _BLOCK, len(rest))
        errors = torch.empty_like(rest[first:last])
        for row in range(first, last):
            codes[row] = (rest[row] / steps[row]).round_().clamp_(low, high)
            errors[row - first] = (rest[row] - codes[row] * steps[row]) / inverse_root[row, row]
            rest[row + 1 : last].addr_(inverse_root[row, row + 1 : last], errors[row - first], alpha=-1)
        rest[last:].addmm_(inverse_root[first:last, last:].T, errors, alpha=-1)
    return codes.T


def _codes(name: str, layer: FakeQuantizedLinear, moments: Tensor, damping: float) -> tuple[Tensor, float]:
    """GPTQ's codes [out, in], nearest ones where these are no worse, int8 if they fit; and the ratio of the errors."""
    low, high = grid(layer.bit_width)
    scale = _scale(layer)
    weight = layer.weight.view_as(scale)

    # inputs with the largest moments first: what they lose is spread over the most
    order = moments.diagonal().argsort(descending=True)
    h = moments[order][:, order]
    h += damping * h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny) * torch.eye(len(h), device=h.device)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        root = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ValueError(
            f"GPTQ's second moments of what goes into {name} cannot be inverted with damping {damping:g}; take 0.01, "
            "or 0.1 if that does not do, or more samples."
        ) from None
    codes = torch.empty_like(weight)
    codes[:, order] = gptq_codes(weight[:, order], scale[:, order], root, low, high)

    steps = weight / scale
    nearest = steps.round().clamp(low, high)
    of_nearest, of_gptq = (_output_error((each - steps) * scale, moments) for each in (nearest, codes))
    if of_gptq >= of_nearest:
        codes, of_gptq = nearest, of_nearest
    return codes.to(torch.int8 if high < 128 else torch.int16), of_gptq / of_nearest if of_nearest else 1.0


@torch.no_grad()
def move_to_codes(layer: FakeQuantizedLinear, codes: Tensor, margin: float) -> None:
    """Move latent weights into the bins of ``codes``, whole numbers [out, in], as `gptq_initialize` does."""
    low, high = grid(layer.bit_width)
    scale = _scale(layer)
    steps = layer.weight.view_as(scale) / scale
    bottom, top = codes - 0.5 + margin, codes + 0.5 - margin
    bottom[codes == low], top[codes == high] = -torch.inf, torch.inf  # what is clipped is on its code
    moved = torch.minimum(torch.maximum(steps, bottom), top)
    layer.weight.copy_((moved * scale).view_as(layer.weight))


def _scale(layer: FakeQuantizedLinear) -> Tensor:
    """The scale of each weight, [out, in]."""
    scale = symmetric_scale(layer.current_clip(), layer.bit_width)
    return scale.expand_as(layer.grouped_weight()).reshape(layer.out_features, layer.in_features)


def _output_error(difference: Tensor, moments: Tensor) -> float:
    """The expected squared error of the outputs, summed over them: sum of d^T H d over rows d."""
    return float(((difference @ moments) * difference).sum())


def _second_moments(model: nn.Module, chunk: Iterable[_Layers], run: Callable[[], None]) -> dict[str, Tensor]:
    """First name of each set -> mean of x x^T over the inputs x of its layers in the float model, [in, in] fp32."""
    layers = {name: layer for group in chunk for name, layer in group.items()}
    first_of = {name: next(iter(group)) for group in chunk for name in group}
    sums = {name: torch.zeros(layers[name].in_features, layers[name].in_features) for name in first_of.values()}
    counts = dict.fromkeys(sums, 0)

    def observe(name: str, x: Tensor) -> None:
        layer, first = layers[name], first_of[name]
        if isinstance(layer, FakeQuantizedPointwiseConv2d):
            x = x.movedim(-3, -1)
        rows = x.reshape(-1, layer.in_features).float()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the input of {name} is not finite; check the model in float32.")
        sums[first] = sums[first].to(rows.device).addmm_(rows.T, rows)
        counts[first] += len(rows)

    with observed_inputs(layers, observe), quantization_disabled(model):
        run()
    if missed := [name for name, count in counts.items() if not count]:
        raise ValueError(f"no input of {missed[0]} was seen; give batches that run through the whole model.")
    return {name: total / counts[name] for name, total in sums.items()}


def _chunks(groups: Iterable[_Layers], max_bytes: int) -> Iterator[list[_Layers]]:
    chunk: list[_Layers] = []
    held = 0
    for group in groups:
        size = 4 * next(iter(group.values())).in_features ** 2
        if chunk and held + size > max_bytes:
            yield chunk
            chunk, held = [], 0
        chunk.append(group)
        held += size
    yield chunk
