"""Tiny tokenizers: words come back, each class's own marks are where its encoder looks for them, any text is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fbqat_hub.training.tokenizers import train_tokenizer

TEXTS = ["red heart", "dark red heart", "pouting cat", "cat face", "hot face", "a red cat"]
KINDS = ["GemmaTokenizer", "T5Tokenizer", "CLIPTokenizer"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return train_tokenizer(request.param, TEXTS, 64, 16)


def test_is_of_the_class_and_learned(tokenizer) -> None:
    """A word that is often there is fewer tokens than it has letters."""
    assert type(tokenizer).__name__ in KINDS
    assert tokenizer.model_max_length == 16
    assert 20 < len(tokenizer) <= 64
    assert len(tokenizer("heart", add_special_tokens=False).input_ids) < 5
    assert max(tokenizer(TEXTS[0]).input_ids) < len(tokenizer)


@pytest.mark.parametrize("text", [*TEXTS, "heart cat", "face"])
def test_words_come_back(text: str, tokenizer) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_pads_and_truncates_to_the_length_asked_for(tokenizer) -> None:
    batch = tokenizer(["red", "a red cat " * 9], padding="max_length", max_length=8, truncation=True)
    assert [len(ids) for ids in batch.input_ids] == [8, 8]
    padding = [token for token, used in zip(batch.input_ids[0], batch.attention_mask[0], strict=True) if not used]
    assert 0 < len(padding) < 8
    assert set(padding) == {tokenizer.pad_token_id}
    assert sum(batch.attention_mask[1]) == 8


@pytest.mark.parametrize("text", ["", "é 猫 \U0001f63e", "RED <b>!?", "\t\n"])
def test_any_text_is_taken(text: str, tokenizer) -> None:
    ids = tokenizer(text, padding="max_length", max_length=16, truncation=True).input_ids
    assert len(ids) == 16
    assert all(0 <= each < len(tokenizer) for each in ids)


def test_saved_and_loaded_gives_equal_ids(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    texts = [*TEXTS, "", "unseen zebra é"]
    options = {"padding": "max_length", "max_length": 12, "truncation": True}
    for key in ("input_ids", "attention_mask"):
        assert loaded(texts, **options)[key] == tokenizer(texts, **options)[key]
    assert loaded.model_max_length == 16


# each class's own marks


def test_gemma_starts_with_bos() -> None:
    tokenizer = train_tokenizer("GemmaTokenizer", TEXTS, 64, 16)
    ids = tokenizer("red cat").input_ids
    assert ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.eos_token_id not in ids


def test_t5_ends_with_eos_also_when_cut() -> None:
    tokenizer = train_tokenizer("T5Tokenizer", TEXTS, 64, 16)
    assert tokenizer.eos_token == "</s>"
    for text, length in (("red cat", 16), ("red cat " * 9, 6)):
        ids = tokenizer(text, max_length=length, truncation=True).input_ids
        assert ids[-1] == tokenizer.eos_token_id == 1
        assert tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.pad_token_id == 0  # what T5 pads with
    assert not any(token.startswith("<extra_id") for token in tokenizer.get_vocab())


def test_clip_marks_the_ends_of_words_and_of_the_text() -> None:
    """A CLIP encoder takes the pooled text at the first end-of-text token."""
    tokenizer = train_tokenizer("CLIPTokenizer", TEXTS, 64, 16)
    ids = tokenizer("Red cat").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id not in ids[1:-1]
    ends = [token for token in tokenizer.convert_ids_to_tokens(ids[1:-1]) if token.endswith("</w>")]
    assert len(ends) == 2
    assert ids == tokenizer("red  cat").input_ids  # case and spaces are normalised
    cut = tokenizer("red cat " * 9, max_length=6, truncation=True).input_ids
    assert cut[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_unknown_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="tokenizer is 'BertTokenizer'; there are GemmaTokenizer, T5Tokenizer, CLIPT"):
        train_tokenizer("BertTokenizer", TEXTS, 64, 16)
