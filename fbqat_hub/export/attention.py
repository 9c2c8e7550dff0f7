"""Attention processors for the graph: what diffusers computes, as matmul, softmax, matmul.

ONNX's fused `Attention` op would silently run in float on the HTP. Shapes: N pictures (1 in a graph), tokens, channels;
`bias` is added to the scores, [N, 1, tokens of the context].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Diffusers' own guard of linear attention. In the QDQ graph a floor becomes at least one quantization step.
SMALLEST_NORMALISER = 1e-15


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: [N, heads, tokens, d] each -> [N, tokens, heads * d]."""
    scores = (query @ key.transpose(-1, -2)) * key.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, None]  # [N, 1, tokens] -> [N, 1, 1, tokens]
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[N, tokens, heads * d] -> [N, heads, tokens, d]."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def normalized(norm: Any, value: Tensor) -> Tensor:
    """`norm(value)`, or `value` where there is no norm."""
    return value if norm is None else norm(value)


def _query_key_value(attn: Any, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    return normalized(attn.norm_q, query), normalized(attn.norm_k, key), value


class ExplicitAttention:
    """Self- or cross-attention on [N, tokens, channels] (Sana, PixArt-Sigma), or over a picture (AutoencoderKL)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if hidden_states.ndim == 4:
            return self._picture(attn, hidden_states)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (split_heads(item, attn.heads) for item in _query_key_value(attn, hidden_states, context))
        attended = attend(query, key, value, attention_mask)
        return attn.to_out[0](attended) / attn.rescale_output_factor

    def _picture(self, attn: Any, picture: Tensor) -> Tensor:
        """An autoencoder's attention over the pixels of [N, channels, height, width]."""
        tokens = normalized(attn.group_norm, picture.flatten(2)).transpose(1, 2)
        attended: Tensor = self(attn, tokens).transpose(1, 2).unflatten(2, picture.shape[2:])
        return attended + picture if attn.residual_connection else attended


class ExplicitLinearAttention:
    """Sana's ReLU linear attention, (v k^T) q / (sum(k) q), on [N, tokens, channels].

    Numerator and normaliser stay in two tensors, so that each gets a quantization range of its own.
    """

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


class ExplicitJointAttention:
    """Attention of picture and text tokens together (SD3), or of picture tokens alone; norms per head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        query, key, value = (
            split_heads(layer(hidden_states), attn.heads) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = normalized(attn.norm_q, query), normalized(attn.norm_k, key)
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = (
                split_heads(layer(encoder_hidden_states), attn.heads) for layer in layers
            )
            query = torch.cat([query, normalized(attn.norm_added_q, text_query)], dim=2)
            key = torch.cat([key, normalized(attn.norm_added_k, text_key)], dim=2)
            value = torch.cat([value, text_value], dim=2)
        attended = attend(query, key, value)
        if encoder_hidden_states is None:
            return attn.to_out[0](attended)
        if attn.context_pre_only:  # nobody reads the text's part: a split with a dead output would run in float
            return attn.to_out[0](attended[:, : hidden_states.shape[1]]), None
        picture, texts = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](picture), attn.to_add_out(texts)


def rotate(tokens: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on [1, tokens, heads, d] -> [1, heads, tokens, d], the channels of a head in another order.

    Diffusers leaves real and imaginary parts interleaved; here all real parts come first. Query and key are reordered
    alike, so their product is the same, and no 5-D tensor is needed.

    Args:
        rotary: cos and sin, each [tokens, d], every value twice (diffusers' form).
    """
    count, heads, width = tokens.shape[1:]
    cosine, sine = (part[:, None, ::2] for part in rotary)  # [tokens, 1, d / 2]
    pairs = tokens.reshape(count, heads, width // 2, 2)
    real, imaginary = (part.squeeze(-1) for part in pairs.split(1, dim=-1))
    turned = torch.cat([real * cosine - imaginary * sine, imaginary * cosine + real * sine], dim=-1)
    return turned.transpose(0, 1)[None]


class ExplicitRotaryAttention:
    """FLUX's attention: text before picture, norms per head, rotary positions; in single blocks one stream alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        shape = (attn.heads, attn.head_dim)
        query, key, value = (layer(hidden_states).unflatten(2, shape) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = (layer(encoder_hidden_states).unflatten(2, shape) for layer in layers)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        assert image_rotary_emb is not None
        attended = attend(rotate(query, image_rotary_emb), rotate(key, image_rotary_emb), value.transpose(1, 2))
        if encoder_hidden_states is None:
            return attended
        text, picture = attended.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](picture), attn.to_add_out(text)
