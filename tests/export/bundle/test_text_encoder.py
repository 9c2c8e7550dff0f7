"""Text encoders' graphs compute what transformers computes for the pipelines, which join them as the host does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle import text_encoder
from fbqat_hub.export.bundle.float_part import compile_part
from fbqat_hub.export.bundle.runtime.text import denoiser_inputs
from fbqat_hub.export.bundle.text_bundle import quantize_encoder
from fbqat_hub.export.bundle.text_encoder import compute_in_float32, wrap_text_encoder
from fbqat_hub.export.htp import compiler
from fbqat_hub.export.htp.targets import target_for
from fbqat_hub.export.progress import Progress
from fbqat_hub.families.graph import MASK_BIAS
from fbqat_hub.quantization import ActivationScheme, WeightScheme, convert, prepare, set_bit_width

TOKENS = 6
CLIP = {"vocab_size": 20, "hidden_size": 16, "projection_dim": 16, "num_attention_heads": 2, "intermediate_size": 32}
GEMMA = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "sliding_window": 8}
CLIP |= {"num_hidden_layers": 3, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1}


def seeded(model: Any) -> Any:
    """With norms and biases that are not degenerate, in numbers that half precision has."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = ((1 + 0.2 * noise) if parameter.ndim == 1 else 0.3 * noise).half().float()
    return model.eval()


def gemma() -> Any:
    return seeded(Gemma2Model(Gemma2Config(**GEMMA)))


def t5() -> Any:
    shape = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return seeded(T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu")))


def item() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 7, 19, 3, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}


def graph_output(model: Any, masked: bool, folder: Path) -> np.ndarray:
    """What the stages make in turn."""
    encoder = wrap_text_encoder("text_encoder", model, TOKENS, masked, folder)
    values = encoder.host_inputs(item())
    for first, last in encoder.stages.values():
        encoder.stage(first, last).run(values)
    return values["tokens"].numpy()


@pytest.fixture(params=["one graph", "a graph a layer"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder whole, and in as many graphs as it has layers."""
    if request.param == "a graph a layer":
        monkeypatch.setattr(text_encoder, "MOST_WEIGHTS", 1)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("make", "masked"), [(gemma, True), (t5, True), (t5, False)])
def test_tokens_of_causal_and_padded_encoders(make: Any, masked: bool, tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        given = item() if masked else {"input_ids": item()["input_ids"]}
        expected = model(**given).last_hidden_state.numpy()
    np.testing.assert_allclose(graph_output(model, masked, tmp_path), expected, atol=1e-4)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("eos", [3, 2], ids=["the end token", "the highest token"])
def test_clip_s_last_layer_but_one_and_its_pooled_vector(eos: int, tmp_path: Path) -> None:
    model = seeded(CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, eos_token_id=eos)))
    with torch.no_grad():
        expected = model(input_ids=item()["input_ids"], output_hidden_states=True)
    output = graph_output(model, False, tmp_path)
    np.testing.assert_allclose(output[:, :-1], expected.hidden_states[-2].numpy(), atol=1e-4)
    np.testing.assert_allclose(output[:, -1], expected.text_embeds.numpy(), atol=1e-4)


def test_clip_without_projection_is_its_pooled_vector_alone(tmp_path: Path) -> None:
    model = seeded(CLIPTextModel(CLIPTextConfig(**CLIP, eos_token_id=3)))
    with torch.no_grad():
        expected = model(input_ids=item()["input_ids"]).pooler_output.numpy()
    np.testing.assert_allclose(graph_output(model, False, tmp_path)[:, 0], expected, atol=1e-4)


def test_a_large_encoder_is_cut_behind_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As few graphs as the weights of a layer allow, of about as many layers each."""
    model = Gemma2Model(Gemma2Config(**GEMMA | {"num_hidden_layers": 5}))
    assert wrap_text_encoder("text_encoder", model, TOKENS, True, tmp_path).stages == {"text_encoder": (0, 5)}
    of_a_layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
    monkeypatch.setattr(text_encoder, "MOST_WEIGHTS", 2 * of_a_layer)
    encoder = wrap_text_encoder("text_encoder", model, TOKENS, True, tmp_path)
    assert encoder.stages == {"text_encoder-0": (0, 1), "text_encoder-1": (1, 3), "text_encoder-2": (3, 5)}
    first, last = encoder.stage(0, 1), encoder.stage(3, 5)
    assert (first.inputs, first.output_name) == (("token_embeddings", "encoder_bias"), "hidden_1")
    assert (last.inputs, last.output_name) == (("hidden_3", "encoder_bias"), "tokens")
    assert first.twin["layers"][0] is not model.layers[0]
    assert len(first.twin["layers"]) == 1


def test_t5_xxl_and_gemma_2_2b_take_24_and_9_graphs() -> None:
    """As docs/htp.md says, of their checkpoints' shapes."""
    wide = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    large = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256}
    large |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    with torch.device("meta"):
        blocks = T5EncoderModel(T5Config(vocab_size=20, **wide, feed_forward_proj="gated-gelu")).encoder.block
        layers = Gemma2Model(Gemma2Config(vocab_size=20, **large)).layers
    assert len(text_encoder._stages("text_encoder", blocks)) == 24
    assert len(text_encoder._stages("text_encoder", layers)) == 9


@pytest.mark.slow
@pytest.mark.parametrize("make", [gemma, t5], ids=["gemma", "t5"])
def test_two_graphs_of_an_encoder_are_as_good_as_one(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the emulator, the second graph fed with what the first made; and what transformers computes is near both."""
    pytest.importorskip("onnxruntime_qnn")
    model, target, bar, reached = make(), target_for("sm8750"), Progress(1, shown=False), {}
    for graphs, most in {1: text_encoder.MOST_WEIGHTS, 2: 1}.items():
        monkeypatch.setattr(text_encoder, "MOST_WEIGHTS", most)
        encoder, folder = wrap_text_encoder("text_encoder", model, TOKENS, True, tmp_path), tmp_path / str(graphs)
        folder.mkdir()
        part = quantize_encoder(encoder, type(model).__name__, [item()], [item()], folder, bar)
        sections = compile_part(part, folder, target, bar)
        assert len(sections) == graphs
        last = list(sections.values())[-1]
        reached[graphs] = last["parity"]["emulator_vs_torch_packed"]["sqnr_db"]
    assert min(reached.values()) > 20, reached  # 24 and 32 dB: weights of 0.3 make sharp attention
    assert reached[2] == pytest.approx(reached[1], abs=0.5)
    chain = {name: section["tensors"] for name, section in sections.items()}
    with compiler.EmulatorChain(folder, chain, target) as emulator:
        output = emulator.run({name: value.numpy() for name, value in encoder.host_inputs(item()).items()})[0]
    with torch.no_grad():
        expected = model(**item()).last_hidden_state.numpy()
    assert sqnr_db([expected], [output]) == pytest.approx(reached[2], abs=0.5)


def test_an_encoder_that_came_packed_keeps_its_codes(tmp_path: Path) -> None:
    """Gemma 2's keys and values once a query head among them: rows are repeated, codes are not made again."""
    model = gemma()
    prepare(model, WeightScheme(), ActivationScheme(bits=32))
    set_bit_width(model, 4)
    convert(model)
    with torch.no_grad():
        expected = model(**item()).last_hidden_state.numpy()
    np.testing.assert_allclose(graph_output(model, True, tmp_path), expected, atol=1e-4)
    layers = wrap_text_encoder("text_encoder", model, TOKENS, True, tmp_path).stage(0, 2).pack()
    assert {layer.weight_bits for layer in layers.values()} == {4}
    assert layers["layers.0.self_attn.k_proj"].codes().shape[0] == 2 * model.layers[0].self_attn.k_proj.out_features
    assert torch.equal(layers["layers.0.mlp.up_proj"].codes(), model.layers[0].mlp.up_proj.codes())


def test_what_has_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"text encoder Linear; there is one for: CLIPTextModel"):
        wrap_text_encoder("text_encoder", torch.nn.Linear(2, 2), TOKENS, False, tmp_path)
    with pytest.raises(ExportError, match="9 tokens are more than the sliding window of 8"):
        wrap_text_encoder("text_encoder", gemma(), 9, True, tmp_path)


@pytest.mark.parametrize(("size", "stored"), [(1.0, torch.float16), (1e6, torch.float32)])
def test_the_table_is_in_half_precision_where_it_fits(size: float, stored: torch.dtype, tmp_path: Path) -> None:
    model = gemma()
    model.embed_tokens.weight.data.mul_(size / model.embed_tokens.weight.abs().max())
    encoder = wrap_text_encoder("text_encoder", model, TOKENS, True, tmp_path)
    table = load_file(encoder.table)["embedding"]
    with torch.no_grad():
        expected = model.embed_tokens(torch.arange(20))
    assert table.dtype is stored
    torch.testing.assert_close(table.float(), expected, rtol=1e-3, atol=1e-4)
    embeddings = encoder.host_inputs(item())["token_embeddings"]
    assert torch.equal(embeddings[0], table.float()[item()["input_ids"][0]])


@pytest.mark.parametrize("make", [gemma, t5], ids=["gemma", "t5"])
def test_embeddings_stay_as_they_are_stored_and_the_rest_computes_in_float32(make: Any, tmp_path: Path) -> None:
    """A scale that the encoder multiplies them with is applied in float32 too."""
    make().to(torch.bfloat16).save_pretrained(tmp_path)
    model, exact = (type(make()).from_pretrained(tmp_path, dtype=each) for each in (torch.bfloat16, torch.float32))
    changed = compute_in_float32(model)
    assert changed.dtype is torch.float32
    assert {each.dtype for each in changed.parameters()} == {torch.float32}
    with torch.no_grad():
        made, expected = (each(**item()).last_hidden_state for each in (changed, exact))
    assert torch.equal(made, expected)


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
