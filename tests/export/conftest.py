"""A packed one-block Sana, inputs for it, and its export, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from fbqat_hub.export import export_htp
from fbqat_hub.quantization import ActivationScheme, WeightScheme, calibrate, convert, prepare, set_bit_width

Item = dict[str, Tensor]


def float_sana(blocks: int = 1, **config: Any) -> SanaTransformer2DModel:
    """A tiny Sana of random weights whose norms, biases and modulation are not degenerate."""
    torch.manual_seed(0)
    shape = {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 5, "attention_head_dim": 32,
        "num_cross_attention_heads": 5, "cross_attention_head_dim": 32, "cross_attention_dim": 160,
        "caption_channels": 128, "mlp_ratio": 2.5, "sample_size": 8, "patch_size": 1, "interpolation_scale": 1.0,
    }  # fmt: skip
    model = SanaTransformer2DModel(num_layers=blocks, **(shape | config)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name:
            parameter.data = 0.3 * noise
        elif parameter.ndim == 1:
            parameter.data = 1 + 0.1 * noise if "norm" in name else 0.05 * noise
    return model


def make_items(count: int, seed: int) -> list[Item]:
    """Keyword arguments of the forward: texts of 4 to 16 tokens, timesteps all over."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        mask = torch.zeros(1, 16)
        mask[:, : int(torch.randint(4, 17, (), generator=generator))] = 1
        items.append(
            {
                "hidden_states": torch.randn(1, 16, 8, 8, generator=generator),
                "encoder_hidden_states": torch.randn(1, 16, 128, generator=generator),
                "encoder_attention_mask": mask,
                "timestep": 1000 * torch.rand(1, generator=generator),
            }
        )
    return items


def pack(
    model: nn.Module,
    *,
    activation_range: str = "static",
    not_convert: tuple[str, ...] = (),
    overrides: dict[str, dict[str, Any]] | None = None,
    widths: dict[str, int] | None = None,
) -> nn.Module:
    """`model`, packed in place at W4A8, or at the `widths` of layers."""
    scheme = ActivationScheme(bits=8, range=activation_range)
    prepare(model, WeightScheme(clip="mse"), scheme, not_convert=not_convert, overrides=overrides, widths=widths)
    if activation_range == "static":
        calibrate(model, make_items(16, seed=1))
    set_bit_width(model, 4)
    convert(model)
    return model


@pytest.fixture(scope="session")
def packed_sana() -> nn.Module:
    return pack(float_sana())


@pytest.fixture(scope="session")
def calibration() -> list[Item]:
    return make_items(16, seed=1)


@pytest.fixture(scope="session")
def held_out() -> list[Item]:
    return make_items(4, seed=2)


@pytest.fixture(scope="session")
def exported(
    packed_sana: nn.Module, calibration: list[Item], held_out: list[Item], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of one export and its certificate."""
    pytest.importorskip("onnxruntime_qnn")
    folder = tmp_path_factory.mktemp("export") / "out"
    return folder, export_htp(packed_sana, calibration, held_out, folder, progress=False)


@pytest.fixture
def export(calibration: list[Item], held_out: list[Item]) -> Callable[..., dict[str, Any]]:
    """`export_htp` with the shared inputs and no bar."""

    def call(model: nn.Module, folder: Path, **options: Any) -> dict[str, Any]:
        return export_htp(model, calibration, held_out[:1], folder, **({"progress": False} | options))

    return call
