"""The real client pointed at a loopback Hub, and a small run to publish."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from safetensors.numpy import save_file

from tests.hub.server import LoopbackHub, loopback_hub

TOKEN = "hf_" + "writetokenofme" * 3
READ_TOKEN = "hf_" + "readtokenofme" * 3
FINE_TOKEN = "hf_" + "finegrainedtoken" * 3
REPO = "me/Tiny-FBQAT-W4A8"


def user(role: str, **fine: Any) -> dict[str, Any]:
    """What whoami says of "me", a member of two organizations."""
    orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    return {"name": "me", "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role, **fine}}}


TOKENS = {
    TOKEN: user("write"),
    READ_TOKEN: user("read"),
    FINE_TOKEN: user(
        "fineGrained",
        fineGrained={"scoped": [{"entity": {"name": "lab", "type": "org"}, "permissions": ["repo.write"]}]},
    ),
}


def point_client_at(hub: LoopbackHub, home: Path, patch: pytest.MonkeyPatch) -> list[float]:
    """Make huggingface_hub in this process talk to ``hub``, over LFS, with its cache under ``home``.

    Returns:
        The seconds that the client would have slept between tries; it does not sleep.
    """
    slept: list[float] = []
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions of the module, which diffusers calls
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("HF_XET_CACHE", str(home / "xet"))
    clock = SimpleNamespace(sleep=slept.append)
    patch.setattr("huggingface_hub.utils._http.time", clock)
    patch.setattr("huggingface_hub.file_download.time", clock)
    close_session()
    return slept


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A loopback Hub that this process's client talks to, logged in as "me" who may write."""
    with loopback_hub(TOKENS) as server:
        point_client_at(server, tmp_path / "home", monkeypatch)
        yield server


CARD = """---
license: apache-2.0
base_model: somebody/base
base_model_relation: quantized
library_name: diffusers
pipeline_tag: text-to-image
tags: [fbqat, 4-bit, w4a8, quantization-aware-training, sana]
model-index:
- name: Tiny-FBQAT-W4A8
  results:
  - task: {type: text-to-image}
    dataset: {name: openmoji, type: openmoji}
    metrics: [{type: kd_loss, value: 0.0125, name: held-out distillation loss}]
---
# Tiny

pipe = DiffusionPipeline.from_pretrained(".", dtype=torch.float32)
"""


def write_run(folder: Path, seed: int = 0) -> Path:
    """A run's folder of some kilobytes with all that is published, and with what never is."""
    recipe = {
        "name": "Tiny-FBQAT-W4A8",
        "family": "sana",
        "teacher": "somebody/base",
        "method": "fbqat",
        "license": "apache-2.0",
    }
    config = {"quantization_config": {"weight_bits": 4, "activation_bits": 8, "fbqat_version": "0.1.0"}}
    index: dict[str, Any] = {"_class_name": "SanaPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    index["transformer"] = ["diffusers", "SanaTransformer2DModel"]
    files: dict[str, str] = {
        "README.md": CARD,
        "recipe.yaml": yaml.safe_dump(recipe),
        "model_index.json": json.dumps(index),
        "transformer/config.json": json.dumps(config),
        "scheduler/scheduler_config.json": "{}",
        "htp/certificate.json": json.dumps({"asked": {"soc": "sm8750"}}),
        "htp/transformer.bin": f"context binary {seed}",
        "htp/libQnnHtp.so": "not ours to pass on",
        "images/comparison.png": "picture",
        "images/samples/00000.png": "sample",
        "checkpoints/step-00000002/state.safetensors": "checkpoint",
        "transformer/diffusion_pytorch_model.bin": "a pickle",
        "transformer/model.safetensors.partial-7": "partial",
        ".cache/huggingface/x.lock": "",
        "notes.txt": "mine",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    weights = {"w": np.random.default_rng(seed).integers(0, 255, 4096, dtype=np.uint8)}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def write_stages(run: Path, seed: int = 0) -> Path:
    """Stages of 8 and 6 bits in a run's folder, measured, with their cards."""
    for bits in (8, 6):
        folder = run / "stages" / f"w{bits}"
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        (folder / "images" / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "images" / "comparison.png").write_text(f"picture of {bits} bits")
        (folder / "images" / "samples" / "00000.png").write_text("sample")
        config = {"weight_bits": bits, "activation_bits": 8, "fbqat_version": "0.1.0"}
        (folder / "transformer" / "config.json").write_text(json.dumps({"quantization_config": config}))
        weights = {"w": np.random.default_rng(seed + bits).integers(0, 255, 4096, dtype=np.uint8)}
        save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        (folder / "README.md").write_text(CARD.replace("4-bit, w4a8", f"{bits}-bit, w{bits}a8"))
    return run


PUBLISHED = [
    "README.md", "fbqat.json", "htp/certificate.json", "htp/transformer.bin", "images/comparison.png",
    "model_index.json", "recipe.yaml", "scheduler/scheduler_config.json", "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
]  # fmt: skip


# of a branch of a stage
PUBLISHED_OF_STAGE = [path for path in PUBLISHED if not path.startswith("htp/")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")
