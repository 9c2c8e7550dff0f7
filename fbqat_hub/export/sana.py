"""Sana's transformer as a graph the HTP can run: what diffusers computes, written with ops that survive.

Three things differ from the forward of `diffusers.SanaTransformer2DModel`, none in exact arithmetic beyond float
rounding: sin/cos of the timestep and the text mask's bias are computed on the host; scaled-dot-product attention is
written as matmul, softmax, matmul (ONNX's `Attention` op would silently run in float); linear attention keeps its
numerator and its normaliser in two tensors, so that each gets a quantization range of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.float_graph import GraphWrapper, float_twin

#: Added to the attention score of a padded text token. exp(-30) = 1e-13 of the weight of a real one, while
#: diffusers' -10000 would stretch the range of the scores until 16 bits hold nothing else.
MASK_BIAS = -30.0


#: Diffusers' own guard of linear attention. In the QDQ graph a floor becomes at least one quantization step.
SMALLEST_NORMALISER = 1e-15


def _query_key_value(attn: Any, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


class ExplicitAttention:
    """Attention processor: softmax(q k^T / sqrt(d) + bias) v, on [N, tokens, channels], without fused ops."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = _query_key_value(attn, hidden_states, context)
        # [N, tokens, heads * d] -> [N, heads, tokens, d]
        query, key, value = (item.unflatten(2, (attn.heads, -1)).transpose(1, 2) for item in (query, key, value))
        scores = (query @ key.transpose(-1, -2)) * key.shape[-1] ** -0.5
        if attention_mask is not None:
            scores = scores + attention_mask[:, None]  # [N, 1, tokens] -> [N, 1, 1, tokens]
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](attended) / attn.rescale_output_factor


class ExplicitLinearAttention:
    """Sana's ReLU linear attention, (v k^T) q / (sum(k) q), on [N, tokens, channels]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = _query_key_value(attn, hidden_states, hidden_states)
        # [N, tokens, heads * d] -> [N, heads, d, tokens]
        query, key, value = (item.transpose(1, 2).unflatten(1, (attn.heads, -1)) for item in (query, key, value))
        query, key = F.relu(query), F.relu(key)
        numerator = (value @ key.transpose(2, 3)) @ query  # [N, heads, d, tokens]
        normaliser = key.sum(-1, keepdim=True).transpose(2, 3) @ query  # [N, heads, 1, tokens]
        # diffusers adds 1e-15, which the exporter drops as nothing; 0 / 0 of a dead head must stay 0 all the same
        normaliser = torch.maximum(normaliser, torch.full((), SMALLEST_NORMALISER))
        attended = (numerator / normaliser).flatten(1, 2).transpose(1, 2)
        return attn.to_out[0](attended)


class SanaGraph(nn.Module):
    """The twin with positional inputs: see `sana_wrapper` for what they are."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.twin = twin

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep_embedding: Tensor,
        *encoder_attention_bias: Tensor,
    ) -> Tensor:
        mask = encoder_attention_bias[0] if encoder_attention_bias else None
        output: Tensor = self.twin(
            hidden_states, encoder_hidden_states, timestep_embedding, encoder_attention_mask=mask, return_dict=False
        )[0]
        return output


def sana_wrapper(transformer: nn.Module) -> GraphWrapper:
    """The graph of a (packed) `SanaTransformer2DModel`; `transformer` itself is not changed.

    Graph inputs, float32: `hidden_states` [1, C, H, W] latents; `encoder_hidden_states` [1, tokens, caption_channels];
    `timestep_embedding` [1, 256], the sin/cos projection of the timestep; `encoder_attention_bias` [1, 1, tokens],
    0 where the text mask is 1 and `MASK_BIAS` where it is 0 (absent where the item has no mask).

    Raises:
        ExportError: the model has guidance embeddings, which this graph does not take yet.
    """
    if getattr(getattr(transformer, "config", None), "guidance_embeds", False):
        raise ExportError("SanaTransformer2DModel with guidance_embeds=True cannot be exported")
    twin: Any = float_twin(transformer)
    time_proj = twin.time_embed.emb.time_proj
    twin.time_embed.emb.time_proj = nn.Identity()
    for block in twin.transformer_blocks:
        block.attn1.set_processor(ExplicitLinearAttention())
        if block.attn2 is not None:
            block.attn2.set_processor(ExplicitAttention())

    def host_inputs(item: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {
            "hidden_states": item["hidden_states"].float(),
            "encoder_hidden_states": item["encoder_hidden_states"].float(),
            "timestep_embedding": time_proj(item["timestep"].reshape(-1)).float(),
        }
        mask = item.get("encoder_attention_mask")
        if mask is not None:
            inputs["encoder_attention_bias"] = ((1.0 - mask.float()) * MASK_BIAS)[:, None]
        return inputs

    with torch.no_grad():
        return GraphWrapper(module=SanaGraph(twin), host_inputs=host_inputs)
