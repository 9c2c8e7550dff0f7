"""What plain ``from_pretrained("owner/name")`` sees of a damaged download, and what only ``fbqat pull`` sees.

The sentences that these hold are in docs/publishing.md and SECURITY.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from fbqat_hub.hub.contents import collect
from fbqat_hub.hub.manifest import MANIFEST
from fbqat_hub.hub.publish import hashes_of, manifest_of
from fbqat_hub.hub.pull import pull
from fbqat_hub.pipelines import load_pipeline
from tests.hub.conftest import REPO
from tests.hub.server import LoopbackHub

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(run_folder: Path) -> dict[str, bytes]:
    """Path -> content of what publishing the tiny run puts on the Hub, but for a card."""
    items, _, _ = collect(run_folder, REPO)
    contents = {item.path: item.open().read() for item in items}
    return {**contents, MANIFEST: manifest_of(run_folder, run_folder, items, hashes_of(items)).to_bytes()}


@pytest.fixture
def snapshot(hub: LoopbackHub, published: dict[str, bytes]) -> Path:
    """The repository as ``from_pretrained`` left it in the Hub's cache."""
    hub.add(REPO, published)
    DiffusionPipeline.from_pretrained(REPO)
    (folder,) = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*")
    assert not (folder / MANIFEST).exists()  # diffusers fetches what it knows
    return folder


def rewrite(path: Path, content: bytes) -> None:
    """Change what the cache holds of a file, a link to its blob."""
    path.resolve().write_bytes(content)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_weight_file_that_lost_its_last_byte_is_refused(snapshot: Path, component: str) -> None:
    """By safetensors: the header says how long the file is."""
    (path,) = (snapshot / component).glob("*.safetensors")
    rewrite(path, path.read_bytes()[:-1])
    with pytest.raises((OSError, SafetensorError)):
        DiffusionPipeline.from_pretrained(REPO)
    with pytest.raises(ValueError, match=f"{component}/{path.name} is damaged or cut short"):
        load_pipeline(REPO)


@pytest.mark.parametrize("path", [WEIGHTS, "scheduler/scheduler_config.json"])
def test_a_missing_file_is_fetched_or_refused(snapshot: Path, hub: LoopbackHub, path: str) -> None:
    (snapshot / path).unlink()
    hub.fail("info", 503, times=99)
    with pytest.raises(OSError, match=r"is incomplete: 1 file\(s\) are missing"):
        DiffusionPipeline.from_pretrained(REPO)
    hub.heal()
    hub.fail("tree", 503, times=99)
    DiffusionPipeline.from_pretrained(REPO)
    assert (snapshot / path).is_file()


def test_a_download_that_is_cut_is_an_error_and_the_next_call_completes_it(
    hub: LoopbackHub, published: dict[str, bytes]
) -> None:
    hub.add(REPO, published)
    hub.fail("cdn", "cut", times=99)
    with pytest.raises(HTTPError):
        DiffusionPipeline.from_pretrained(REPO)
    hub.heal()
    DiffusionPipeline.from_pretrained(REPO)


def test_a_changed_byte_is_seen_by_pull_alone(snapshot: Path, published: dict[str, bytes]) -> None:
    """The last byte of the weights is a value like any other. The pull names the file and fetches it again."""
    rewrite(snapshot / WEIGHTS, published[WEIGHTS][:-1] + bytes([published[WEIGHTS][-1] ^ 1]))
    DiffusionPipeline.from_pretrained(REPO)
    load_pipeline(REPO)
    lines: list[str] = []
    pull(REPO, say=lines.append)
    assert lines[0].startswith(f"fetched again, for not being as published: {WEIGHTS}: has SHA-256 ")
    assert (snapshot / WEIGHTS).read_bytes() == published[WEIGHTS]


def test_after_a_pull_sizes_are_compared_with_the_manifest(snapshot: Path, published: dict[str, bytes]) -> None:
    pull(REPO)
    rewrite(snapshot / "transformer" / "config.json", published["transformer/config.json"] + b" ")
    with pytest.raises(ValueError, match=r"transformer/config.json has \d+ bytes of \d+. Fetch it again"):
        DiffusionPipeline.from_pretrained(REPO)
