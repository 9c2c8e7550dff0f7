"""A pipeline that is called once for what several steps need, and the inputs that are taken of many."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fbqat_hub.export.bundle.pipeline import encode_prompts, generate, record_inputs, remembering
from fbqat_hub.export.onnx.items import spread
from fbqat_hub.pipelines import load_pipeline
from tests.conftest import CALL, CAPTIONS


def test_a_method_is_called_once_for_the_same_values() -> None:
    calls: list[Any] = []

    def method(*given: Any, **named: Any) -> int:
        calls.append((given, named))
        return len(calls)

    owner = SimpleNamespace(method=method)
    with remembering(owner, "method"):
        assert owner.method("a", 1) == owner.method("a", 1) == 1
        assert owner.method(["a"], device=torch.device("cpu")) == 2
        assert owner.method(torch.tensor([1, 2])) == owner.method(torch.tensor([1, 2])) == 3
        assert owner.method(torch.tensor([1, 3])) == 4
        assert owner.method(ids=torch.tensor([1.0], dtype=torch.bfloat16)) == 5


def test_a_method_that_failed_is_as_it_was() -> None:
    class Owner:
        def method(self) -> None:
            raise KeyError

    owner = Owner()
    with pytest.raises(KeyError), remembering(owner, "method"):
        owner.method()
    assert "method" not in vars(owner)


def test_a_pipeline_that_has_encoded_its_prompts_goes_on_without_text_encoder(tiny_sana: Any) -> None:
    """To the same picture; neither denoiser nor autoencoder was used before."""
    expected = generate(load_pipeline(tiny_sana), CAPTIONS[0], CALL, 0)
    pipeline = load_pipeline(tiny_sana)
    transformer, vae = pipeline.transformer, pipeline.vae
    with remembering(pipeline, "encode_prompt"):
        pipeline.transformer = transformer.__class__.from_config(transformer.config).to(transformer.dtype)
        pipeline.vae = vae.__class__.from_config(vae.config)
        encode_prompts(pipeline, CAPTIONS[:1], CALL)
        pipeline.text_encoder, pipeline.transformer, pipeline.vae = None, transformer, vae
        made = generate(pipeline, CAPTIONS[0], CALL, 0)
        items = record_inputs(pipeline, CAPTIONS[:1], CALL)
    assert (made.picture == expected.picture).all()
    assert len(items) == len(expected.items)
    for item, other in zip(items, expected.items, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in item.items())


def test_some_of_many_inputs_in_order_and_of_both_branches() -> None:
    items = [{"place": torch.tensor(place)} for place in range(200)]
    places = [int(item["place"]) for item in spread(items, 100)]
    assert places == sorted(set(places))
    assert len(places) == 100
    assert 30 < sum(place % 2 for place in places) < 70
    assert [int(item["place"]) for item in spread(items, 100)] == places
    assert spread(items[:3], 5) == items[:3]
    assert len(spread(items, 1)) == 1
