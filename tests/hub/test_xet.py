"""The Xet path: hf_xet itself chunks, uploads and reconstructs, with a store in a folder instead of the Hub's."""

from __future__ import annotations

from pathlib import Path

import hf_xet
import pytest
from huggingface_hub import constants

from fbqat_hub.hub.client import HubError
from fbqat_hub.hub.manifest import FileEntry, hash_file
from fbqat_hub.hub.publish import publish
from fbqat_hub.hub.pull import pull
from tests.hub.conftest import PUBLISHED, REPO
from tests.hub.server import LFS, LoopbackHub


@pytest.fixture(autouse=True)
def xet_on(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


def entry_of(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return hash_file(file)


def test_published_and_pulled_over_xet(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    (run / "htp" / "transformer.bin").write_bytes(bytes(range(256)) * 2**12)  # 1 MiB: many chunks, most of them alike
    hub.xet = tmp_path / "store"
    hub.xet.mkdir()
    large = [run / path for path in PUBLISHED if LFS.fullmatch(path)]
    found = hf_xet.hash_files([str(path) for path in large])
    hub.xet_hashes = {entry_of(path).sha256: info.hash for path, info in zip(large, found, strict=True)}
    publish(run, REPO)
    assert (hub.count("batch"), hub.count("put")) == (0, 0)
    assert hub.count("xet-token") > 0
    assert sorted(hub.repositories[REPO].files) == sorted([".gitattributes", *PUBLISHED])
    folder = pull(REPO, tmp_path / "pulled").folder
    assert hub.count("cdn") == 0
    assert all((folder / path.relative_to(run)).read_bytes() == path.read_bytes() for path in large)


def test_a_hub_without_xet_is_told(hub: LoopbackHub, run: Path) -> None:
    with pytest.raises(HubError, match=r"^upload to me/Tiny-FBQAT-W4A8: .*xet-write-token"):
        publish(run, REPO)
    assert list(hub.repositories[REPO].files) == [".gitattributes"]
