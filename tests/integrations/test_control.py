"""ControlNets and IP-Adapters do to a packed denoiser what they do to the float one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from PIL import Image
from torch import Tensor, nn

from fbqat_hub.pipelines import load_pipeline
from tests.conftest import call_of
from tests.integrations.tiny import pack_denoiser

PIPELINES = {
    "flux": FluxControlNetPipeline,
    "sana": SanaControlNetPipeline,
    "sd3": StableDiffusion3ControlNetPipeline,
}


def control_of(family: str, denoiser: Any) -> Any:
    """A ControlNet of a float denoiser; its last layers, which begin at zero, are random."""
    torch.manual_seed(0)
    if family == "flux":
        heads = {name: denoiser.config[name] for name in ("attention_head_dim", "num_attention_heads")}
        net: Any = FluxControlNetModel.from_transformer(denoiser, num_layers=1, num_single_layers=1, **heads)
    elif family == "sd3":
        net = SD3ControlNetModel.from_transformer(denoiser, num_layers=1, num_extra_conditioning_channels=0)
    else:
        net = SanaControlNetModel.from_config({**denoiser.config, "num_layers": 1})
    for name, weight in net.named_parameters():
        if name.startswith(("controlnet_", "input_block")) and not weight.any():
            nn.init.normal_(weight, std=0.5)
    return net


def change(pictures: Callable[[float], Tensor]) -> Tensor:
    """What a strength of 1 changes of a picture without, flat."""
    return (pictures(1.0) - pictures(0.0)).flatten()


@pytest.mark.parametrize("family", PIPELINES)
def test_a_controlnet_steers_a_packed_model_as_the_float_one(family: str, teacher_of: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(teacher_of(family), torch.float32)
    steered: Any = PIPELINES[family](**pipeline.components, controlnet=control_of(family, pipeline.transformer))
    steered.set_progress_bar_config(disable=True)
    call = {name: value for name, value in call_of(family, pipeline).items() if name != "complex_human_instruction"}
    picture = Image.new("RGB", (call["width"], call["height"]), (200, 30, 30))
    none = {"complex_human_instruction": None} if family == "sana" else {}

    def pictures(strength: float) -> Tensor:
        random = torch.Generator().manual_seed(0)
        options = {"generator": random, "output_type": "pt", "controlnet_conditioning_scale": strength}
        made: Tensor = steered(prompt="dark red", control_image=picture, **call, **none, **options).images
        return made

    of_float = change(pictures)
    pack_denoiser(pipeline, family)
    of_packed = change(pictures)
    assert of_float.norm() > 1e-2
    assert torch.cosine_similarity(of_float, of_packed, dim=0) > 0.9


def test_an_ip_adapter_steers_a_packed_flux_as_the_float_one(teacher_of: Callable[[str], Path]) -> None:
    pipeline: Any = load_pipeline(teacher_of("flux"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    width, texts = config.num_attention_heads * config.attention_head_dim, config.joint_attention_dim
    torch.manual_seed(0)
    projection = {"proj.weight": torch.randn(4 * texts, 8), "proj.bias": torch.zeros(4 * texts)}
    norm = {"norm.weight": torch.ones(texts), "norm.bias": torch.zeros(texts)}
    adapter = {
        f"{block}.to_{part}_ip.{kind}": torch.randn(width, texts) if kind == "weight" else torch.zeros(width)
        for block in range(len(pipeline.transformer.transformer_blocks))
        for part in "kv"
        for kind in ("weight", "bias")
    }

    def pictures(strength: float) -> Tensor:
        pipeline.set_ip_adapter_scale(strength)
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        embeds = {"ip_adapter_image_embeds": [torch.ones(1, 1, 8)]}
        embeds["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 8)]
        made: Tensor = pipeline("dark red", **embeds, **call_of("flux", pipeline), **options).images
        return made

    changes = []
    for pack in (False, True):
        if pack:
            pack_denoiser(pipeline, "flux")
        pipeline.transformer._load_ip_adapter_weights([{"image_proj": projection | norm, "ip_adapter": adapter}])
        changes.append(change(pictures))
    assert changes[0].norm() > 1e-2
    assert torch.cosine_similarity(*changes, dim=0) > 0.9
