"""Text encoders' graphs compute what transformers computes for the pipelines, which join them as the host does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle.runtime.text import denoiser_inputs
from fbqat_hub.export.bundle.text_encoder import wrap_text_encoder
from fbqat_hub.families.graph import MASK_BIAS

TOKENS = 6
CLIP = {"vocab_size": 20, "hidden_size": 16, "projection_dim": 16, "num_attention_heads": 2, "intermediate_size": 32}
CLIP |= {"num_hidden_layers": 3, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1}


def seeded(model: Any) -> Any:
    """With norms and biases that are not degenerate."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.2 * noise) if parameter.ndim == 1 else 0.3 * noise
    return model.eval()


def gemma() -> Any:
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "sliding_window": 8}
    return seeded(Gemma2Model(Gemma2Config(**shape, **heads)))


def t5() -> Any:
    shape = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return seeded(T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu")))


def item() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 7, 19, 3, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}


def graph_output(name: str, model: Any, masked: bool) -> np.ndarray:
    encoder = wrap_text_encoder(name, model, TOKENS, masked)
    with torch.no_grad():
        return encoder.wrapper.module(*encoder.wrapper.host_inputs(item()).values())[0].numpy()


@pytest.mark.parametrize(("make", "masked"), [(gemma, True), (t5, True), (t5, False)])
def test_tokens_of_causal_and_padded_encoders(make: Any, masked: bool) -> None:
    model = make()
    with torch.no_grad():
        given = item() if masked else {"input_ids": item()["input_ids"]}
        expected = model(**given).last_hidden_state.numpy()
    np.testing.assert_allclose(graph_output("text_encoder", model, masked), expected, atol=1e-4)


@pytest.mark.parametrize("eos", [3, 2], ids=["the end token", "the highest token"])
def test_clip_s_last_layer_but_one_and_its_pooled_vector(eos: int) -> None:
    model = seeded(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, eos_token_id=eos)))
    with torch.no_grad():
        expected = model(input_ids=item()["input_ids"], output_hidden_states=True)
    output = graph_output("text_encoder", model, False)
    np.testing.assert_allclose(output[:, :-1], expected.hidden_states[-2].numpy(), atol=1e-4)
    np.testing.assert_allclose(output[:, -1], expected.text_embeds.numpy(), atol=1e-4)


def test_clip_without_projection_is_its_pooled_vector_alone() -> None:
    model = seeded(CLIPTextModel(CLIPTextConfig(**CLIP, eos_token_id=3)))
    with torch.no_grad():
        expected = model(input_ids=item()["input_ids"]).pooler_output.numpy()
    np.testing.assert_allclose(graph_output("text_encoder", model, False)[:, 0], expected, atol=1e-4)


def test_what_has_no_graph_is_refused() -> None:
    with pytest.raises(ExportError, match=r"text encoder Linear; there is one for: CLIPTextModel"):
        wrap_text_encoder("text_encoder", torch.nn.Linear(2, 2), TOKENS, False)
    with pytest.raises(ExportError, match="9 tokens are more than the sliding window of 8"):
        wrap_text_encoder("text_encoder", gemma(), 9, True)


def test_outputs_are_joined_as_sd3_does() -> None:
    """Two pooled encoders side by side in channels, padded to the third's width, whose tokens follow."""
    first, second, third = np.ones((1, 3, 2)), 2 * np.ones((1, 3, 2)), 3 * np.ones((1, 4, 5))
    text: list[dict[str, Any]] = [{"end": 1}, {"end": 1}, {"end": None, "kept": None}]
    made = denoiser_inputs(text, [first, second, third], np.array([1, 1, 0, 0]), mask_bias=MASK_BIAS)
    assert made["encoder_hidden_states"].shape == (1, 2 + 4, 5)
    assert made["encoder_hidden_states"][0, 0].tolist() == [1, 1, 2, 2, 0]
    assert made["pooled_projections"].tolist() == [[1, 1, 2, 2]]
    assert made["encoder_attention_bias"].tolist() == [[[0, 0, MASK_BIAS, MASK_BIAS]]]


def test_of_an_instruction_and_a_text_the_first_token_and_the_last_ones_stay() -> None:
    hidden, mask = np.arange(6).reshape(1, 6, 1), np.array([1, 1, 1, 1, 1, 0])
    made = denoiser_inputs([{"end": None, "kept": 3}], [hidden], mask, mask_bias=MASK_BIAS)
    assert made["encoder_hidden_states"].reshape(-1).tolist() == [0, 4, 5]
    assert made["encoder_attention_bias"].tolist() == [[[0, 0, MASK_BIAS]]]
