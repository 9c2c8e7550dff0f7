"""Scales and biases of a packed model are trained alone, and end in its stored tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import ActivationScheme, PackedLayer, WeightScheme, convert, named_layers, prepare
from fbqat_hub.quantization.tuning import scales_tuned


def packed(group_size: int | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.SiLU(), nn.Flatten(2), nn.Linear(16, 5, bias=False))
    weights = WeightScheme() if group_size is None else WeightScheme(granularity="per_group", group_size=group_size)
    prepare(model, weights, ActivationScheme())
    convert(model)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_what_was_trained_is_what_is_stored() -> None:
    model, x = packed(), torch.randn(2, 8, 4, 4)
    before, layout = tensors(model), set(dict(model.named_parameters()))
    start = model(x)
    with scales_tuned(model):
        torch.testing.assert_close(model(x), start)  # factors of 1; (y - b) + b
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        assert set(trained) == {"0.scale_factor", "0.bias", "3.scale_factor"}
        model(x).square().mean().backward()
        with torch.no_grad():
            for each in trained.values():
                assert each.grad.abs().max() > 0
                each -= 0.1 * each.grad
        tuned = model(x)
    torch.testing.assert_close(model(x), tuned, rtol=1e-5, atol=1e-6)
    assert (tuned - start).abs().max() > 1e-3
    after = tensors(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "0.weight_scale",
        "0.bias",
        "3.weight_scale",
    }
    assert set(dict(model.named_parameters())) == layout
    assert not any(each.requires_grad for each in model.parameters())


def test_factors_have_the_gradient_of_the_scales() -> None:
    """d/d factor of a factor at 1 is the scale times d/d scale: here by finite differences of the stored scale."""
    model, x = packed(), torch.randn(2, 8, 4, 4)
    (_, layer), *_ = named_layers(model, PackedLayer)
    with scales_tuned(model):
        model(x).sum().backward()
        grad = layer.scale_factor.grad.clone()
    # the second layer rounds its input, so the difference is of the first layer's output alone
    outputs = []
    for step in (-1e-3, 1e-3):
        changed = packed()
        changed[0].weight_scale *= 1 + step
        outputs.append(changed[0](x))
    slope = (outputs[1] - outputs[0]) / 2e-3
    y = model[0](x).detach().requires_grad_(True)
    model[1:](y).sum().backward()
    torch.testing.assert_close(grad, (y.grad * slope).sum((0, 2, 3)), rtol=1e-2, atol=1e-3)


def test_a_failure_leaves_the_scales() -> None:
    model = packed()
    before = tensors(model)

    def fail() -> None:
        with scales_tuned(model):
            model[0].scale_factor.data *= 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_groups_and_float_models_are_refused() -> None:
    with pytest.raises(ValueError, match="0 has a scale per group"), scales_tuned(packed(group_size=4)):
        pass
    with pytest.raises(ValueError, match="no packed layer"), scales_tuned(nn.Sequential(nn.Linear(2, 2))):
        pass
