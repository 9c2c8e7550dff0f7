"""The four families' transformers as graphs the HTP can run: what diffusers computes, written with ops that survive.

What differs from diffusers' forward, none of it in exact arithmetic beyond float rounding: sin/cos of the timestep and
the text mask's bias are computed on the host; rotary positions are constants; attention is explicit (`attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.export.bundle.runtime.text import MASK_BIAS
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.attention import (
    ExplicitAttention,
    ExplicitJointAttention,
    ExplicitLinearAttention,
    ExplicitMultiscaleAttention,
    ExplicitRotaryAttention,
)
from fbqat_hub.export.onnx.float_graph import GraphWrapper, TwinModule, float_twin

#: Inputs of FLUX that become constants: positions of the tokens, [tokens, 3], without a batch.
POSITIONS = ("txt_ids", "img_ids")

Item = Mapping[str, Tensor]


def blocks_of(transformer: nn.Module) -> tuple[str, ...]:
    """Names of the transformer's blocks, in order."""
    stacks = ("transformer_blocks", "single_transformer_blocks")
    return tuple(f"{stack}.{index}" for stack in stacks for index in range(len(getattr(transformer, stack, ()))))


class _OwnForward(TwinModule):
    """The twin's own forward with positional tensors for the keyword arguments `names`."""

    def __init__(self, twin: nn.Module, names: list[str]) -> None:
        super().__init__(twin, blocks_of(twin))
        self.names = names

    def compute(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.twin(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]
        return output


class _FluxForward(TwinModule):
    """FLUX's forward with the timestep's sin/cos given and the rotary positions as constants."""

    def __init__(self, twin: Any, rotary: tuple[Tensor, Tensor]) -> None:
        super().__init__(twin, blocks_of(twin))
        self.register_buffer("cosine", rotary[0])
        self.register_buffer("sine", rotary[1])

    def compute(self, *inputs: Tensor) -> Tensor:
        hidden_states, encoder_hidden_states, pooled_projections, timestep_embedding = inputs
        twin: Any = self.twin
        rotary = (self.cosine, self.sine)
        embed = twin.time_text_embed
        temb = embed.timestep_embedder(timestep_embedding) + embed.text_embedder(pooled_projections)
        picture, text = twin.x_embedder(hidden_states), twin.context_embedder(encoder_hidden_states)
        for block in [*twin.transformer_blocks, *twin.single_transformer_blocks]:
            text, picture = block(hidden_states=picture, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        output: Tensor = twin.proj_out(twin.norm_out(picture, temb))
        return output


def _host(time_proj: nn.Module, time_scale: float, names: tuple[str, ...]) -> Callable[[Item], dict[str, Tensor]]:
    """Host-side inputs: `names` as they are, the timestep's sin/cos [1, 256], the text mask's bias [1, 1, tokens]."""

    def host_inputs(item: Item) -> dict[str, Tensor]:
        inputs = {name: item[name].float() for name in names}
        inputs["timestep_embedding"] = time_proj(time_scale * item["timestep"].reshape(-1).float()).float()
        if (mask := item.get("encoder_attention_mask")) is not None:
            inputs["encoder_attention_bias"] = ((1.0 - mask.float()) * MASK_BIAS)[:, None]
        return inputs

    return host_inputs


def _through_forward(twin: Any, embed: Any, example: Item, names: tuple[str, ...]) -> GraphWrapper:
    """A wrapper around the twin's own forward, whose `embed.time_proj` is done on the host."""
    time_proj, embed.time_proj = embed.time_proj, nn.Identity()
    keywords = [*names, "timestep"] + (["encoder_attention_mask"] if "encoder_attention_mask" in example else [])
    return GraphWrapper(module=_OwnForward(twin, keywords), host_inputs=_host(time_proj, 1.0, names))


def _refuse(transformer: nn.Module, option: str, unsupported: Any = True) -> None:
    if getattr(getattr(transformer, "config", None), option, None) == unsupported:
        raise ExportError(f"{type(transformer).__name__} with {option}={unsupported!r} cannot be exported")


def _sana(transformer: nn.Module, example: Item) -> GraphWrapper:
    _refuse(transformer, "guidance_embeds")
    twin: Any = float_twin(transformer)
    for block in twin.transformer_blocks:
        block.attn1.set_processor(ExplicitLinearAttention())
        if block.attn2 is not None:
            block.attn2.set_processor(ExplicitAttention())
    return _through_forward(twin, twin.time_embed.emb, example, ("hidden_states", "encoder_hidden_states"))


def _pixart_sigma(transformer: nn.Module, example: Item) -> GraphWrapper:
    _refuse(transformer, "use_additional_conditions")
    twin: Any = float_twin(transformer)
    for block in twin.transformer_blocks:
        block.attn1.set_processor(ExplicitAttention())
        block.attn2.set_processor(ExplicitAttention())
    return _through_forward(twin, twin.adaln_single.emb, example, ("hidden_states", "encoder_hidden_states"))


def _sd3(transformer: nn.Module, example: Item) -> GraphWrapper:
    twin: Any = float_twin(transformer)
    twin.set_attn_processor(ExplicitJointAttention())
    position = twin.pos_embed  # the crop for this size becomes the table of a smaller model
    position.pos_embed = position.cropped_pos_embed(*example["hidden_states"].shape[-2:])
    position.pos_embed_max_size = None
    position.height, position.width = (side // position.patch_size for side in example["hidden_states"].shape[-2:])
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    return _through_forward(twin, twin.time_text_embed, example, names)


def _flux(transformer: nn.Module, example: Item) -> GraphWrapper:
    _refuse(transformer, "guidance_embeds")
    twin: Any = float_twin(transformer)
    twin.set_attn_processor(ExplicitRotaryAttention())
    rotary = twin.pos_embed(torch.cat([example[ids] for ids in POSITIONS]))
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    host = _host(twin.time_text_embed.time_proj, 1000.0, names)

    def host_inputs(item: Item) -> dict[str, Tensor]:
        for ids in POSITIONS:
            if not torch.equal(item[ids], example[ids]):
                raise ExportError(f"an item's {ids} differ from the first item's; positions are constants of the graph")
        return host(item)

    return GraphWrapper(module=_FluxForward(twin, rotary), host_inputs=host_inputs)


#: Transformer class -> how its graph is wrapped.
WRAPPERS: dict[str, Callable[[nn.Module, Item], GraphWrapper]] = {
    "SanaTransformer2DModel": _sana,
    "PixArtTransformer2DModel": _pixart_sigma,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}


def wrap(transformer: nn.Module, example: Item) -> GraphWrapper:
    """The graph of a (packed) transformer of one of the four families; `transformer` itself is not changed.

    Graph inputs, float32, batch 1: `hidden_states` (latents [1, C, H, W]; FLUX: tokens [1, tokens, C]),
    `encoder_hidden_states` [1, tokens, D], of SD3 and FLUX also `pooled_projections` [1, D]; `timestep_embedding`
    [1, 256], the sin/cos projection of the timestep; `encoder_attention_bias` [1, 1, tokens], 0 where the text mask is
    1 and `MASK_BIAS` where it is 0 (absent where `example` has no mask).

    Args:
        example: keyword arguments of the transformer's forward; says whether there is a mask, and FLUX's positions.

    Raises:
        ExportError: a class or an option of the model that has no graph.
    """
    name = type(transformer).__name__
    if name not in WRAPPERS:
        raise ExportError(f"no HTP export for {name}; there is one for: {', '.join(sorted(WRAPPERS))}")
    with torch.no_grad():
        return WRAPPERS[name](transformer, example)


class _Decoder(TwinModule):
    """Latents as the sampler leaves them -> pixels, about [-1, 1]."""

    def __init__(self, twin: nn.Module, scale: float, shift: float) -> None:
        super().__init__(twin)
        self.scale, self.shift = scale, shift

    def compute(self, *inputs: Tensor) -> Tensor:
        latents = inputs[0] * (1 / self.scale)
        output: Tensor = self.twin(latents + self.shift if self.shift else latents)
        # a reshape at the end: the compiler's layout change then happens on codes, before it, and not on floats
        return output.flatten(2)


def wrap_decoder(vae: Any) -> GraphWrapper:
    """The graph of an autoencoder's decoder: `latents` [1, C, h, w] -> `picture` [1, 3, H * W]; scaling included.

    Raises:
        ExportError: the autoencoder is of no class that one of the four families uses, or its linear attention of no
            ReLU.
    """
    name = type(vae).__name__
    if name not in ("AutoencoderKL", "AutoencoderDC"):
        raise ExportError(f"no HTP export for the decoder of {name}; there is one for: AutoencoderDC, AutoencoderKL")
    first = getattr(vae, "post_quant_conv", None) or nn.Identity()
    twin: Any = float_twin(nn.Sequential(first, vae.decoder))
    for module in twin.modules():
        if type(module).__name__ == "Attention":
            module.set_processor(ExplicitAttention())
        elif type(module).__name__ == "SanaMultiscaleLinearAttention":
            if not isinstance(module.nonlinearity, nn.ReLU):
                raise ExportError(
                    f"no HTP export for linear attention of {type(module.nonlinearity).__name__}; of ReLU"
                )
            module.processor = ExplicitMultiscaleAttention()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        return GraphWrapper(
            module=_Decoder(twin, float(vae.config.scaling_factor), float(shift)),
            host_inputs=lambda item: {"latents": item["latents"].float()},
            output_name="picture",
        )
