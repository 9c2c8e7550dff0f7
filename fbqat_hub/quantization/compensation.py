"""Codes whose rounding errors compensate each other: where training starts, or ends when there is none.

Rounding each weight to its nearest code is best for the weight, not for what the layer computes: inputs are
correlated, so the error of one weight can undo that of another. GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323)
rounds a row from left to right and spreads each error over the weights still to come, by the inverse of the inputs'
second moments H = E[x x^T]. Training then starts from a layer that computes nearly the right thing, instead of
spending its steps on finding such codes by flipping one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.convert import named_layers, observed_inputs, quantization_disabled
from fbqat_hub.quantization.fake_quantize import grid, symmetric_scale
from fbqat_hub.quantization.linear import FakeQuantizedLinear, FakeQuantizedPointwiseConv2d

# Rows rounded before the rest hears of their errors, in one matrix product.
_BLOCK = 64


@torch.no_grad()
def compensate(
    model: nn.Module,
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    *,
    damping: float = 0.01,
    margin: float = 0.05,
    max_bytes: int = 2**31,
) -> dict[str, float]:
    """Move every latent weight of a prepared model into the bin of its compensated code.

    A weight whose compensated code is its nearest one stays where it is (but ``margin`` from the edge); the others go
    to the near edge of their new bin, so that training can still take them back. Scales stay as they are.

    Args:
        model: a prepared model with symmetric weights, at the bit width to compensate for.
        batches: gives keyword arguments of ``model.forward``, the same ones at every call. It is called once for each
            set of layers whose second moments fit into ``max_bytes``.
        damping: added to the diagonal of H, as a share of its mean.
        margin: how far inside its bin a weight is put, in steps; at least half the softness that training starts
            with, if it is to start on the grid.
        max_bytes: of second moments held at a time, fp32.

    Returns:
        name -> the layer's expected squared output error as a share of that of nearest rounding.

    Raises:
        ValueError: nothing to compensate, affine weights, a margin outside 0 .. 0.5, or a layer that no batch reached.
    """
    if not 0 <= margin <= 0.5:
        raise ValueError(f"margin is {margin}; it must be within 0 and 0.5, half a bin.")
    layers = list(named_layers(model, FakeQuantizedLinear))
    if not layers:
        raise ValueError("the model has no fake-quantized layer; prepare it first.")
    for name, layer in layers:
        if layer.weight_scheme.mapping != "symmetric":
            raise ValueError(f"{name} has affine weights; only symmetric ones can be compensated.")
    ratios = {}
    # of the float model; with more than one chunk, of one whose first layers' weights have moved by less than a bin
    for chunk in _chunks(layers, max_bytes):
        moments = _second_moments(model, chunk, batches())
        for name, layer in chunk:
            ratios[name] = _compensate_layer(layer, moments.pop(name), damping, margin)
    return ratios


def compensated_codes(weight: Tensor, scale: Tensor, inverse_root: Tensor, low: float, high: float) -> Tensor:
    """GPTQ's codes, fp32 whole numbers [out, in].

    Args:
        weight, scale: [out, in], fp32.
        inverse_root: the upper Cholesky factor of the inverse of H, [in, in].
        low, high: the smallest and largest code.

    >>> w, ones = torch.tensor([[0.4, 1.3]]), torch.ones(1, 2)
    >>> compensated_codes(w, ones, torch.eye(2), -8, 7)          # uncorrelated inputs: the nearest codes
    tensor([[0., 1.]])
    >>> h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])       # 0.4 is lost, and 0.9 * 0.4 of it the second weight can give
    >>> compensated_codes(w, ones, torch.linalg.cholesky(torch.linalg.inv(h), upper=True), -8, 7)
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


def _compensate_layer(layer: FakeQuantizedLinear, moments: Tensor, damping: float, margin: float) -> float:
    low, high = grid(layer.bit_width, narrow=layer.weight_scheme.narrow)
    grouped = layer._grouped()
    scale = symmetric_scale(layer.current_clip(), layer.bit_width).expand_as(grouped)
    scale = scale.reshape(layer.out_features, layer.in_features)
    weight = layer.weight.view_as(scale)

    # inputs with the largest moments first: what they lose is spread over the most
    order = moments.diagonal().argsort(descending=True)
    h = moments[order][:, order]
    h += damping * h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny) * torch.eye(len(h), device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    root = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(weight)
    codes[:, order] = compensated_codes(weight[:, order], scale[:, order], root, low, high)

    steps = weight / scale
    nearest = _output_error((steps.round().clamp(low, high) - steps) * scale, moments)
    compensated = _output_error((codes - steps) * scale, moments)
    if compensated < nearest:
        bottom, top = codes - 0.5 + margin, codes + 0.5 - margin
        bottom[codes == low], top[codes == high] = -torch.inf, torch.inf  # what is clipped is on its code
        moved = torch.minimum(torch.maximum(steps, bottom), top)
        layer.weight.copy_((moved * scale).view_as(layer.weight))
    return min(1.0, compensated / nearest) if nearest else 1.0


def _output_error(difference: Tensor, moments: Tensor) -> float:
    """The expected squared error of the outputs, summed over them: sum of d^T H d over rows d."""
    return float(((difference @ moments) * difference).sum())


def _second_moments(
    model: nn.Module, layers: Sequence[tuple[str, FakeQuantizedLinear]], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs x of each layer in the float model, [in, in] fp32."""
    of_name = dict(layers)
    sums = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers}
    counts = dict.fromkeys(of_name, 0)

    def observe(name: str, x: Tensor) -> None:
        layer = of_name[name]
        if isinstance(layer, FakeQuantizedPointwiseConv2d):
            x = x.movedim(1, -1)
        rows = x.reshape(-1, layer.in_features).float()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"the input of {name} is not finite; check the model in float32.")
        sums[name] = sums[name].to(rows.device).addmm_(rows.T, rows)
        counts[name] += len(rows)

    with observed_inputs(of_name, observe), quantization_disabled(model):
        for batch in batches:
            model(**batch)
    if missed := [name for name, count in counts.items() if not count]:
        raise ValueError(f"no input of {missed[0]} was seen; give batches that run through the whole model.")
    return {name: total / counts[name] for name, total in sums.items()}


def _chunks(
    layers: Sequence[tuple[str, FakeQuantizedLinear]], max_bytes: int
) -> Iterable[list[tuple[str, FakeQuantizedLinear]]]:
    chunk: list[tuple[str, FakeQuantizedLinear]] = []
    held = 0
    for name, layer in layers:
        size = 4 * layer.in_features**2
        if chunk and held + size > max_bytes:
            yield chunk
            chunk, held = [], 0
        chunk.append((name, layer))
        held += size
    yield chunk
