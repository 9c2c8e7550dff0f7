"""Tiny tokenizers of the true classes, learned from captions."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers


def train_tokenizer(kind: str, texts: list[str], vocabulary: int, max_tokens: int) -> Any:
    """A tokenizer of the transformers class ``kind``: "GemmaTokenizer", "T5Tokenizer", "CLIPTokenizer" or
    "Qwen2Tokenizer"."""
    makers = {"GemmaTokenizer": _gemma, "T5Tokenizer": _t5, "CLIPTokenizer": _clip, "Qwen2Tokenizer": _qwen}
    if kind not in makers:
        raise ValueError(f"tokenizer is {kind!r}; there are {', '.join(makers)}.")
    return makers[kind](texts, vocabulary, max_tokens)


def _gemma(texts: list[str], vocabulary: int, max_tokens: int) -> Any:
    """Byte-pair merges that never cross a word."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    vocab, merges = _learned_pairs(learner, texts, vocabulary, special)
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    return tokenizer


def _t5(texts: list[str], vocabulary: int, max_tokens: int) -> Any:
    """A unigram model; no sentinel tokens, which only T5's own training uses."""
    from transformers import T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = T5Tokenizer(extra_ids=0).backend_tokenizer.pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(learner.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_tokens)


def _clip(texts: list[str], vocabulary: int, max_tokens: int) -> Any:
    """Byte-level pairs with CLIP's end-of-word mark; padded with the end-of-text token, as CLIP-L's is."""
    from transformers import CLIPTokenizer

    special = ["<|startoftext|>", "<|endoftext|>"]
    own = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(unk_token=special[1], end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = own.normalizer, own.pre_tokenizer
    vocab, merges = _learned_pairs(learner, texts, vocabulary, special, end_of_word_suffix="</w>")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


#: The turns of a conversation as Qwen's models read them, without tools and thoughts.
_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen(texts: list[str], vocabulary: int, max_tokens: int) -> Any:
    """Byte-level pairs, and the marks of a conversation's turns; padded with the end-of-text token."""
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = own.normalizer, own.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # a pipeline's own template has other characters than the captions
    roles = ["user\nassistant\nsystem\n"] * 100
    vocab, merges = _learned_pairs(learner, texts + roles, vocabulary, special, initial_alphabet=alphabet)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, model_max_length=max_tokens, additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = _TURNS
    return tokenizer


def _learned_pairs(
    learner: Tokenizer, texts: list[str], vocabulary: int, special: list[str], **options: Any
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False, **options)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]
