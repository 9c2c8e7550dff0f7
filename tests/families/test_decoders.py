"""The decoders' graphs compute what diffusers does, in float; so do the stages between group norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn

from fbqat_hub.export.bundle.decoder import calls, describe_stage, stage_norm
from fbqat_hub.export.bundle.runtime.tiles import decode_stages, stage_map
from fbqat_hub.export.onnx.float_graph import as_feed
from fbqat_hub.export.onnx.rewrite import traced
from fbqat_hub.families import get_family
from fbqat_hub.families.decoder import decoder_graph, has_group_norms
from fbqat_hub.families.graph import GraphWrapper


def kl() -> nn.Module:
    """With attention in its middle block, as the checkpoints have and the tiny teachers have not."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.1, **blocks)


def dc() -> nn.Module:
    """With linear attention over queries, keys and values cut from one tensor, the checkpoint's lowest stages."""
    stages = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 32), "latent_channels": 4}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), (5,))}
    kinds = {"decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_types": "ResBlock"}
    return AutoencoderDC(**stages, **layers, **scales, **kinds, attention_head_dim=8, downsample_block_type="Conv")


@pytest.mark.parametrize("make", [kl, dc])
def test_a_decoder_with_attention(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    vae = make().eval()
    latents = torch.randn(1, 4, 4, 4)
    wrapper = decoder_graph(vae)
    graph, _ = traced(wrapper, {"latents": latents}, {})
    session = onnxruntime.InferenceSession(graph.model.SerializeToString())
    picture = session.run(None, as_feed(wrapper.host_inputs({"latents": latents})))[0]
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)).sample
    np.testing.assert_allclose(picture.reshape(expected.shape), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("most", [8, 12, 100])
@torch.no_grad()
def test_a_decoder_cut_at_its_group_norms_is_the_whole_one(most: int) -> None:
    """Attention, residual blocks and upsampling in tiles, with norms of the whole picture: there is no seam."""
    torch.manual_seed(0)
    vae = kl().eval()
    for norm in (module for module in vae.decoder.modules() if isinstance(module, nn.GroupNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    latents = torch.randn(1, 4, 16, 28)
    latents[..., 14:] *= 5  # the norms of one half are not those of the other
    stages = get_family("flux").decoder_stages(vae)
    graphs, described, norms = {}, [], {}
    maps = {"latents": latents.numpy()}
    for number, stage in enumerate(stages):
        described.append(describe_stage(f"{number}", stage, maps, [most, most]))
        graphs[f"{number}"] = stage.wrapper
        norms |= stage_norm(f"{number}", stage)
        maps[stage.makes] = stage_map(runs(stage.wrapper), described[-1], maps, norms)
    expected = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample[0].numpy()
    found = decode_stages(lambda name: runs(graphs[name]), latents.numpy(), described, norms)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert (sum(calls(each) for each in described) > len(stages)) == (most < 100)
    attention = [each for each in described if each["skip"] and each["source"] == "stream"]
    assert [each["tile"] for each in attention] == [[16, 28]]


def runs(wrapper: GraphWrapper) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    return lambda feed: wrapper.module(*(torch.from_numpy(value) for value in feed.values()))[0].numpy()


def test_linear_attention_and_rms_norms_need_no_stages() -> None:
    assert not has_group_norms(dc())
    assert has_group_norms(kl())


def test_an_autoencoder_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder of AutoencoderDC cannot be exported; a FLUX"):
        get_family("flux").decoder_graph(dc())
    with pytest.raises(ValueError, match="decoder of AutoencoderDC cannot be exported; a FLUX"):
        get_family("flux").decoder_stages(dc())
