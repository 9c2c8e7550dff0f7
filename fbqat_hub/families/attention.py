"""Attention processors for the graph: what diffusers computes, as matmul, softmax, matmul.

ONNX's fused `Attention` op would silently run in float on the HTP. Shapes: N pictures (1 in a graph), tokens, channels;
`bias` is added to the scores, [N, 1, tokens of the context].
"""

from __future__ import annotations

from collections.abc import Sequence
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


def relu_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Linear attention, (v k^T) q / (sum(k) q) of the ReLU of queries and keys: [N, heads, d, tokens] each.

    Numerator and normaliser stay in two tensors, so that each gets a quantization range of its own.
    """
    query, key = F.relu(query), F.relu(key)
    numerator = (value @ key.transpose(2, 3)) @ query  # [N, heads, d, tokens]
    normaliser = key.sum(-1, keepdim=True).transpose(2, 3) @ query  # [N, heads, 1, tokens]
    # diffusers adds 1e-15, which the exporter drops as nothing; 0 / 0 of a dead head must stay 0 all the same
    normaliser = torch.maximum(normaliser, torch.full((), SMALLEST_NORMALISER))
    return numerator / normaliser


class ExplicitLinearAttention:
    """Sana's ReLU linear attention on [N, tokens, channels]."""

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
        attended = relu_attention(query, key, value).flatten(1, 2).transpose(1, 2)
        return attn.to_out[0](attended)


class ExplicitMultiscaleAttention:
    """ReLU linear attention over a picture [N, channels, height, width] at several scales (AutoencoderDC).

    On few pixels diffusers multiplies in the other order, v (k^T q), which is the same.
    """

    def __call__(self, attn: Any, picture: Tensor) -> Tensor:
        pixels = picture.movedim(1, -1)
        joined = torch.cat([attn.to_q(pixels), attn.to_k(pixels), attn.to_v(pixels)], dim=3).movedim(-1, 1)
        scales = torch.cat([joined, *(block(joined) for block in attn.to_qkv_multiscale)], dim=1)
        query, key, value = scales.flatten(2).unflatten(1, (-1, 3 * attn.attention_head_dim)).chunk(3, dim=2)
        attended = relu_attention(query, key, value).flatten(1, 2).unflatten(2, picture.shape[2:])
        out = attn.to_out(attended.movedim(1, -1))
        out = attn.norm_out(out).movedim(-1, 1) if attn.norm_type == "rms_norm" else attn.norm_out(out.movedim(-1, 1))
        return out + picture if attn.residual_connection else out


def _joint(attn: Any, picture: Tensor, text: Tensor | None, *, text_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of picture and text tokens in one sequence, norms per head: [N, heads, tokens, d] each."""

    def project(tokens: Tensor, layers: Sequence[Any], norms: Sequence[Any]) -> list[Tensor]:
        parts = [split_heads(layer(tokens), attn.heads) for layer in layers]
        return [normalized(norm, part) for norm, part in zip(norms, parts, strict=True)]

    streams = [project(picture, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None))]
    if text is not None:
        layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
        streams.insert(0 if text_first else 1, project(text, layers, (*norms, None)))
    query, key, value = (parts[0] if text is None else torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    return query, key, value


class ExplicitJointAttention:
    """Attention of picture and text tokens together (SD3), or of picture tokens alone; norms per head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        attended = attend(*_joint(attn, hidden_states, encoder_hidden_states, text_first=False))
        if encoder_hidden_states is None:
            return attn.to_out[0](attended)
        if attn.context_pre_only:  # nobody reads the text's part: a split with a dead output would run in float
            return attn.to_out[0](attended[:, : hidden_states.shape[1]]), None
        picture, texts = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](picture), attn.to_add_out(texts)


def rotate(tokens: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on [1, heads, tokens, d], the channels of a head in another order.

    Diffusers leaves real and imaginary parts interleaved; here all real parts come first. Query and key are reordered
    alike, so their product is the same, and no 5-D tensor is needed.

    Args:
        rotary: cos and sin, each [tokens, d], every value twice (diffusers' form).
    """
    heads, count, width = tokens.shape[1:]
    cosine, sine = (part[:, ::2] for part in rotary)  # [tokens, d / 2]
    pairs = tokens.reshape(heads, count, width // 2, 2)
    real, imaginary = (part.squeeze(-1) for part in pairs.split(1, dim=-1))
    return torch.cat([real * cosine - imaginary * sine, imaginary * cosine + real * sine], dim=-1)[None]


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
        query, key, value = _joint(attn, hidden_states, encoder_hidden_states, text_first=True)
        assert image_rotary_emb is not None
        attended = attend(rotate(query, image_rotary_emb), rotate(key, image_rotary_emb), value)
        if encoder_hidden_states is None:
            return attended
        text, picture = attended.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](picture), attn.to_add_out(text)


class ExplicitParallelAttention:
    """A single block of FLUX.2: one projection to queries, keys, values and the feed-forward's input, and one back."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        width = attn.inner_dim
        feed_forward = attn.mlp_hidden_dim * attn.mlp_mult_factor
        parts = attn.to_qkv_mlp_proj(hidden_states).split([width, width, width, feed_forward], dim=-1)
        query, key, value = (split_heads(part, attn.heads) for part in parts[:3])
        assert image_rotary_emb is not None
        query, key = (
            rotate(normalized(norm, part), image_rotary_emb)
            for norm, part in ((attn.norm_q, query), (attn.norm_k, key))
        )
        attended = attend(query, key, value)
        output: Tensor = attn.to_out(torch.cat([attended, attn.mlp_act_fn(parts[3])], dim=-1))
        return output
