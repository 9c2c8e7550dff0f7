"""A prompt's text to the denoiser's inputs: numpy and the tokenizers library; travels with every bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: The denoiser's inputs that are made of a text.
TEXT_INPUTS = ("encoder_hidden_states", "pooled_projections", "encoder_attention_bias")


def tokenize(path: Path, text: str, lower: bool, instruction: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [tokens] and mask [tokens] (1 = text, 0 = padding), int64, cut and padded as the file says.

    Args:
        path: a `tokenizer.json`.
        lower: the pipeline writes texts in lower case, without spaces at the ends.
        instruction: what the pipeline puts before every text.
    """
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(path)).encode(instruction + (text.lower().strip() if lower else text))
    return np.array(encoded.ids, np.int64), np.array(encoded.attention_mask, np.int64)


def encoder_feed(described: Mapping[str, Any], table: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a text encoder's graph, float32.

    Args:
        described: the encoder's entry of the manifest's `text`.
        table: the token embeddings [vocabulary, D]; anything that gives its rows by a slice.

    Returns:
        `token_embeddings` [1, tokens, D]; `encoder_bias` [1, 1, tokens, tokens] of a causal encoder, [1, 1, 1, tokens]
        of one that is told the padding; `end` [1, tokens, 1] of a pooled one, 1 at the token that stands for the text.
    """
    rows = np.concatenate([table[token : token + 1] for token in ids.tolist()])
    feed = {"token_embeddings": rows[None].astype(np.float32)}
    if described["bias"] is not None:
        seen = mask[None] * (np.tri(len(ids)) if described["bias"] == "causal" else 1)
        feed["encoder_bias"] = (described["mask_bias"] * (1 - seen)).astype(np.float32)[None, None]
    if described["end"] is not None:
        place = ids.argmax() if described["end"] == "highest" else (ids == described["end"]).argmax()
        feed["end"] = np.eye(len(ids), dtype=np.float32)[place][None, :, None]
    return feed


def denoiser_inputs(
    text: Sequence[Mapping[str, Any]], outputs: Sequence[np.ndarray], mask: np.ndarray, mask_bias: float | None
) -> dict[str, np.ndarray]:
    """What the denoiser gets of the encoders' outputs.

    Pooled encoders' tokens stand side by side in channels, filled with 0 to the width of the last encoder, whose
    tokens follow; their pooled vectors stand side by side. Of an encoder that also read an instruction, the first
    token and the last ones stay.

    Args:
        text: the manifest's `text`.
        outputs: of each encoder: tokens [1, tokens, D], then (or only) its pooled vector as one more token.
        mask: of the last encoder's tokens.
        mask_bias: what a padded token adds to the denoiser's attention score; None where it is not told the padding.
    """
    inputs: dict[str, np.ndarray] = {}
    pooled = [output[:, -1] for each, output in zip(text, outputs, strict=True) if each["end"] is not None]
    beside = [output[:, :-1] for output in outputs[:-1] if output.shape[1] > 1]
    hidden = outputs[-1]
    if kept := text[-1]["kept"]:
        places = [0, *range(len(mask) - kept + 1, len(mask))]
        hidden, mask = hidden[:, places], mask[places]
    if beside:
        joined = np.concatenate(beside, axis=2)
        joined = np.pad(joined, ((0, 0), (0, 0), (0, hidden.shape[2] - joined.shape[2])))
        hidden = np.concatenate([joined, hidden], axis=1)
    inputs["encoder_hidden_states"] = hidden
    if pooled:
        inputs["pooled_projections"] = np.concatenate(pooled, axis=1)
    if mask_bias is not None:
        inputs["encoder_attention_bias"] = (mask_bias * (1 - mask)).astype(np.float32)[None, None]
    return inputs
