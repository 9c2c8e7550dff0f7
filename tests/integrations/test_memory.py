"""What a packed model keeps in memory, counted without one; and whole tiny models by the kernels of GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fbqat_hub.integrations.checkpoint import packed_layers, targets_of
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers, packed
from fbqat_hub.quantization.convert import replace_layers
from fbqat_hub.training.bases import build_on_meta, configs_of
from fbqat_hub.training.recipe import load_recipe
from tests.conftest import SANA_FIRST
from tests.integrations.tiny import pack_denoiser, predict


@pytest.mark.parametrize(("recipe_name", "gigabytes"), [("flux-schnell", 6.6), ("sana-600m", 0.5)])
def test_a_packed_model_of_true_size_stays_small(recipe_name: str, gigabytes: float) -> None:
    """Every parameter and buffer of the uniform 4-bit model, its floats in bf16."""
    recipe = load_recipe(recipe_name)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build_on_meta(configs_of(recipe.teacher)["transformer"])
    finally:
        torch.set_default_dtype(default)
    config = recipe.config()
    layers = packed_layers(model, config)
    weights = sum(target.layer.weight.numel() for target in targets_of(model, config))
    replace_layers(model, {target.layer: layers[target.names[0]] for target in targets_of(model, config)})
    resident = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert weights / 2 < resident <= gigabytes * 1e9
    assert len(dict(named_layers(model, PackedLayer))) > 100


@pytest.mark.parametrize("family", SANA_FIRST)
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_a_model_by_the_triton_kernels_is_the_model(
    family: str, teacher_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter where there is no card: every layer of a tiny denoiser, float roundings apart."""
    from fbqat_hub.quantization.kernels.triton_kernels import triton_linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = pack_denoiser(load_pipeline(teacher_of(family)), family)
    expected, shapes = predict(model, family), []

    def by_triton(x, weight_packed, weight_scale, bias, scheme, input_scale=None, input_zero_point=None):
        operands = (x, weight_packed, weight_scale, bias)
        if scheme.bits != 8:
            return original(*operands, scheme, input_scale, input_zero_point)
        shapes.append((tuple(x.shape), len(weight_packed)))
        moved = [None if value is None else value.to(device) for value in operands]
        return triton_linear(*moved, scheme, input_scale, input_zero_point).cpu()

    original = packed.packed_linear
    monkeypatch.setattr(packed, "packed_linear", by_triton)
    found = predict(model, family)
    assert len(shapes) >= 10
    # a float rounding can move an activation over a rounding threshold
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
