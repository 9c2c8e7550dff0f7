"""What needs nothing but the model is refused before anything is traced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from fbqat_hub.export import ExportError
from fbqat_hub.export.htp.checks import check_bundle, check_model
from fbqat_hub.families import get_family
from tests.export.conftest import float_sana, pack


def test_a_pattern_is_of_a_layer_whose_bits_can_be_chosen(packed_sana: nn.Module) -> None:
    """Packed or left in float; not of a norm, nor of a depthwise convolution, which would stay as it was."""
    for pattern in ("proj_out", "*.attn1.*", "transformer_blocks.0.ff.conv_point"):
        check_model(packed_sana, [pattern])
    left = pack(float_sana(), not_convert=("caption_projection.*",))
    check_model(left, ["caption_projection.linear_1"])
    for pattern in ("norm_out", "*.conv_depth", "transformer_blocks.0", ""):
        with pytest.raises(ExportError, match=f"a16 pattern {pattern!r} matches no layer".replace("*", r"\*")):
            check_model(packed_sana, [pattern])


def test_several_pictures_of_a_prompt_are_refused(packed_sana: nn.Module) -> None:
    pipeline = type("SanaPipeline", (), {"transformer": packed_sana})()
    check_bundle(pipeline, call={"num_images_per_prompt": 1})
    with pytest.raises(ExportError, match="the call has num_images_per_prompt 2, and a bundle's runner makes one"):
        check_bundle(pipeline, call={"num_images_per_prompt": 2})


def test_an_option_without_a_graph_is_refused() -> None:
    family = get_family("pixart-sigma")
    family.check_graph(SimpleNamespace(config={"use_additional_conditions": False}))
    with pytest.raises(ValueError, match="PixArtTransformer2DModel with use_additional_conditions=True cannot be"):
        family.check_graph(SimpleNamespace(config={"use_additional_conditions": True}))
