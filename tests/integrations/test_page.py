"""The code of docs/integrations.md, docs/lora.md and the README, executed on a tiny Sana."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from tests.conftest import ROOT
from tests.integrations.tiny import denoiser_inputs


def test_the_page(tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimum")
    page = (ROOT / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    inputs = denoiser_inputs("sana", load_pipeline(tiny_sana).transformer)
    names: dict[str, Any] = {"source": str(tiny_sana), "prompt_inputs": inputs}
    exec(blocks[0], names)
    assert names["predicted"].isfinite().all()
    assert not list(named_layers(names["model"], PackedLayer))
    exec(blocks[1], names)
    by_optimum = names["pipeline"]
    packed = dict(named_layers(by_optimum.transformer, PackedLayer))
    assert {layer.weight_bits for layer in packed.values()} == {4, 8}
    assert "proj_out" not in packed
    assert {layer.weight_bits for _, layer in named_layers(by_optimum.text_encoder, PackedLayer)} == {8}


def test_an_adapter_is_merged_as_the_page_on_lora_says(
    tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lora.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pipe = load_pipeline(tiny_sana)
    pipe.transformer.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    pipe.save_lora_weights("style", transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer))
    exec(block, {"pipe": load_pipeline(tiny_sana)})
    before, after = (load_pipeline(folder).transformer.state_dict() for folder in (tiny_sana, Path("merged")))
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert changed == {name for name in after if name.endswith("to_q.weight")}


def test_the_readme_quantizes_as_it_loads_and_in_a_loop(tiny_sana: Path) -> None:
    """One after the other, as they would be pasted; test_demo has the first block, test_peft what the third calls."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for start in ("from diffusers import SanaTransformer2DModel\nfrom fbqat_hub import", "from diffusers import Sana"):
        (block,) = [block for block in blocks if block.startswith(start)][-1:]
        exec(block.replace("path/to/sana", str(tiny_sana)).replace("1000", "10"), names)
        packed = [layer.weight_bits for _, layer in named_layers(names["model"], PackedLayer)]
        assert packed == [4] * len(packed) != []
