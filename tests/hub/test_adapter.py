"""An adapter on the Hub: every problem in one list, one commit, a card that names the base and loads from there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from fbqat_hub import cli
from fbqat_hub.hub.adapter import publish_adapter
from fbqat_hub.hub.publish import publish
from fbqat_hub.training.lora_check import adapter_file
from tests.hub.conftest import REPO
from tests.hub.server import LoopbackHub

STYLE = "me/style"
WEIGHTS = "pytorch_lora_weights.safetensors"
CARD = """---
library_name: diffusers
tags: [lora, fbqat]
---

# LoRA for tiny

```python
pipeline = DiffusionPipeline.from_pretrained("tiny")
pipeline.load_lora_weights("ADAPTER")
```
"""


@pytest.fixture
def style(tmp_path: Path) -> Path:
    folder = tmp_path / "my style"
    (folder / "checkpoints").mkdir(parents=True)
    pair = {"transformer.to_q.lora_A.weight": torch.ones(2, 4), "transformer.to_q.lora_B.weight": torch.ones(4, 2)}
    save_file(pair, folder / WEIGHTS)
    (folder / "README.md").write_text(CARD)
    (folder / "check-0.png").write_bytes(b"picture")
    (folder / "lora-check.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def problems_of(style: Path, repo: str = STYLE, **options: Any) -> str:
    with pytest.raises(ValueError, match="my style is not ready to be published") as caught:
        publish_adapter(style, repo, **options)
    return "\n".join(caught.value.__notes__)


def test_an_adapter_is_published_for_a_base_that_is_there(
    hub: LoopbackHub, run: Path, style: Path, capsys: Any
) -> None:
    publish(run, REPO)
    before = (style / "README.md").read_text()
    assert cli.main(["lora", "publish", str(style), "--repo", STYLE, "--base", REPO, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("dry run: nothing was uploaded.\n")
    assert STYLE not in hub.repositories
    assert cli.main(["lora", "publish", str(style), "--repo", STYLE, "--base", REPO]) == 0
    out = capsys.readouterr().out
    assert "stays here: notes.txt" in out
    assert "verified: 4 files of " in out
    files = hub.repositories[STYLE].files
    assert sorted(files) == [".gitattributes", "README.md", "check-0.png", "lora-check.json", WEIGHTS]
    card = ModelCard(files["README.md"].content.decode())
    assert (card.data.base_model, card.data.base_model_relation) == (REPO, "adapter")
    assert f'from_pretrained("{REPO}")\npipeline.load_lora_weights("{STYLE}")' in card.text
    assert (style / "README.md").read_text() == before
    assert adapter_file(STYLE).read_bytes() == (style / WEIGHTS).read_bytes()


def test_the_same_again_sends_nothing_and_a_change_sends_itself(hub: LoopbackHub, run: Path, style: Path) -> None:
    publish(run, REPO)
    publish_adapter(style, STYLE, base=REPO)
    commits, lines = len(hub.repositories[STYLE].commits), []
    publish_adapter(style, STYLE, base=REPO, say=lines.append)
    assert f"{STYLE}: nothing changed, nothing uploaded" in lines
    assert len(hub.repositories[STYLE].commits) == commits
    save_file({"transformer.to_q.lora_A.weight": torch.zeros(2, 4)}, style / WEIGHTS)
    publish_adapter(style, STYLE, base=REPO, say=lines.append)
    assert f"{STYLE} (at " in lines[-7]
    assert hub.repositories[STYLE].files[WEIGHTS].content == (style / WEIGHTS).read_bytes()


def test_every_problem_is_said_at_once(hub: LoopbackHub, run: Path, style: Path) -> None:
    save_file({"transformer.to_q.lora_A.weight": torch.full((2, 4), torch.nan)}, style / WEIGHTS)
    found = problems_of(style)
    assert "transformer.to_q.lora_A.weight" in found
    assert "names no base on the Hub; publish the base first, and give --base owner/name" in found
    assert "the base me/nowhere is not on the Hub" in problems_of(style, base="me/nowhere")
    publish(run, REPO)
    assert f"{REPO} exists and holds other files" in problems_of(style, REPO, base=REPO)
    assert "may publish under: me" in problems_of(style, "somebody/style", base=REPO)
    (style / "README.md").write_text(CARD + "\nTrained in /home/somebody/pictures.\n")
    assert "README.md, line" in problems_of(style, base=REPO)
    (style / "README.md").write_text(CARD.replace("---\n", "---\nbase_model: my base\n", 1))
    hub.fail("validate", 400)
    assert f"does not take the front matter of {STYLE}'s README.md: " in problems_of(style, base=REPO)
    (style / "night.png").write_bytes(b"")
    assert "night.png is empty; make it again, or remove it" in problems_of(style, base=REPO)
    (style / "README.md").unlink()
    assert "README.md is missing. Run: fbqat lora check " in problems_of(style, base=REPO)
    assert list(hub.repositories) == [REPO]


def test_what_is_no_adapter_is_refused(hub: LoopbackHub, run: Path, style: Path) -> None:
    publish(run, REPO)
    shutil.move(style / WEIGHTS, style / "adapter_model.safetensors")
    assert "adapter_model.safetensors without adapter_config.json" in problems_of(style, base=REPO)
    (style / "adapter_model.safetensors").unlink()
    assert "it is the folder of no adapter" in problems_of(style, base=REPO)
    save_file({"weight": torch.ones(2, 4)}, style / WEIGHTS)
    assert "has no tensor of an adapter" in problems_of(style, base=REPO)
    (style / WEIGHTS).write_bytes((style / WEIGHTS).read_bytes()[:-4])
    assert "is damaged or cut short" in problems_of(style, base=REPO)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; give that of an adapter"):
        publish_adapter(style.parent / "nowhere", STYLE)
