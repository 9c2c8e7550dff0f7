"""Pull: whole and as published, or an error that names the file and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from fbqat_hub import cli
from fbqat_hub.hub.client import HubError
from fbqat_hub.hub.publish import publish
from fbqat_hub.hub.pull import pull, verify
from tests.hub.conftest import PUBLISHED, REPO, point_client_at, write_run
from tests.hub.server import Blob, LoopbackHub

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def published(hub: LoopbackHub, run: Path) -> LoopbackHub:
    publish(run, REPO)
    hub.requests.clear()
    return hub


def files_in(folder: Path) -> list[str]:
    """What is there, but for the client's notes."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if path.parts[0] != ".cache")


def replace(hub: LoopbackHub, path: str, content: bytes, *, lfs: bool = False) -> None:
    """Commit another content for a file, past our publish."""
    hub.repositories[REPO].commit({**hub.repositories[REPO].files, path: Blob(content, lfs)})
    hub.objects |= {blob.sha256: blob.content for blob in hub.repositories[REPO].files.values() if blob.lfs}


def test_everything_then_from_the_cache(published: LoopbackHub, tmp_path: Path, capsys) -> None:
    assert cli.main(["pull", REPO]) == 0
    assert "verified: 9 files, 4.9 KiB, in " in capsys.readouterr().out
    published.requests.clear()
    folder = verify(REPO).folder
    assert files_in(folder) == PUBLISHED
    assert pull(REPO, offline=True).folder == folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert pull(REPO).folder == folder
    assert published.requests == []
    assert pull(REPO).folder == folder
    assert published.count("cdn") == 0  # the large files are there already


@pytest.mark.parametrize(
    ("use", "left_out"),
    [("diffusers", {"htp/certificate.json", "htp/transformer.bin", "images/comparison.png"}),
     ("htp", {"images/comparison.png", "transformer/config.json", WEIGHTS})],
)  # fmt: skip
def test_only_what_a_use_needs(use, left_out: set[str], published: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "pulled"
    pull(REPO, folder, use=use)
    assert files_in(folder) == sorted(set(PUBLISHED) - left_out)
    verify(str(folder), use=use)
    with pytest.raises(ValueError, match=r"missing; .*verify it with the same --for"):
        verify(str(folder))


def test_what_was_slipped_in_is_not_fetched(published: LoopbackHub, tmp_path: Path) -> None:
    replace(published, "pipeline.py", b"import os")
    replace(published, "transformer/evil.bin", b"a pickle", lfs=True)
    assert files_in(pull(REPO, tmp_path / "pulled").folder) == PUBLISHED


@pytest.mark.parametrize("step", ["tree", "resolve"])
@pytest.mark.parametrize("status", [429, 503])
def test_no_incomplete_snapshot_in_silence(step: str, status: int, published: LoopbackHub, tmp_path: Path) -> None:
    """huggingface_hub falls back to what is in the cache while the Hub does not answer; we do not call it complete."""
    pull(REPO, use="htp")
    published.fail(step, status, times=1000, path=WEIGHTS if step == "resolve" else "")
    if step == "resolve":
        with pytest.raises(HubError, match=f"HTTP {status}.*run the same command again"):
            pull(REPO)
    else:
        pull(REPO)  # file by file, as the list is not answered
        assert files_in(verify(REPO).folder) == PUBLISHED


def test_a_damaged_file_is_named_and_fetched_once_more(published: LoopbackHub, tmp_path: Path, capsys) -> None:
    folder = pull(REPO, tmp_path / "pulled").folder
    damaged = bytearray((folder / WEIGHTS).read_bytes())
    damaged[-1] ^= 1
    (folder / WEIGHTS).write_bytes(damaged)
    (folder / "model_index.json").unlink()
    assert cli.main(["pull", "--verify", str(folder)]) == 1
    err = capsys.readouterr().err
    assert f"model_index.json: missing; {WEIGHTS}: has SHA-256 " in err
    published.requests.clear()
    assert cli.main(["pull", REPO, "--output", str(folder)]) == 0
    assert f"fetched again, for not being as published: {WEIGHTS}: has SHA-256 " in capsys.readouterr().out
    assert published.count("cdn") == 1
    verify(str(folder))


def test_published_damaged_is_not_kept(published: LoopbackHub, tmp_path: Path) -> None:
    """The Hub holds other weights than the manifest says: after a second try an error, and no such weights here."""
    replace(published, WEIGHTS, b"other weights", lfs=True)
    del published.repositories[REPO].files["model_index.json"]
    with pytest.raises(HubError, match=rf"after a second download too: model_index.json: missing; {WEIGHTS}: has 13 "):
        pull(REPO, tmp_path / "pulled")
    assert WEIGHTS not in files_in(tmp_path / "pulled")
    with pytest.raises(ValueError, match="not as it was published"):
        verify(str(tmp_path / "pulled"))


def test_a_cut_download_resumes_by_range(published: LoopbackHub, tmp_path: Path) -> None:
    content = bytes(range(256)) * 2**16  # 16 MiB, past the client's 10 MiB chunk
    run = write_run(tmp_path / "large")
    (run / "htp" / "transformer.bin").write_bytes(content)
    publish(run, REPO)
    published.fail("cdn", "cut")
    folder = pull(REPO, tmp_path / "pulled", use="htp").folder
    assert (folder / "htp" / "transformer.bin").read_bytes() == content
    assert published.count("cdn") == 2


def test_an_edited_card_is_told_and_an_old_file_goes(published: LoopbackHub, run: Path, tmp_path: Path, capsys) -> None:
    pull(REPO, tmp_path / "pulled")
    replace(published, "README.md", b"a better word")
    pull(REPO, tmp_path / "pulled")
    assert "README.md was edited since the model was published" in capsys.readouterr().out
    (run / "htp" / "transformer.bin").rename(run / "htp" / "denoiser.bin")
    publish(run, REPO)
    pull(REPO, tmp_path / "pulled")
    assert files_in(tmp_path / "pulled") == sorted({*PUBLISHED, "htp/denoiser.bin"} - {"htp/transformer.bin"})


def test_a_hostile_manifest_writes_nothing(published: LoopbackHub, tmp_path: Path) -> None:
    held = published.repositories[REPO].files["fbqat.json"].content.decode()
    replace(published, "fbqat.json", held.replace("model_index.json", "../../outside.json").encode())
    with pytest.raises(ValueError, match="is no path of a file inside the folder"):
        pull(REPO, tmp_path / "pulled")
    assert files_in(tmp_path / "pulled") == ["fbqat.json"]
    assert published.count("cdn") == 0


def test_errors_say_what_to_do(published: LoopbackHub, run: Path, tmp_path: Path, monkeypatch) -> None:
    published.add("me/other", {"config.json": b"{}"})
    published.add("me/secret", {"config.json": b"{}"}, private=True)
    with pytest.raises(HubError, match=r"me/other has no fbqat.json: it was not published by fbqat"):
        pull("me/other")
    with pytest.raises(HubError, match=r"look up me/none: HTTP 404 .*there is no such repository"):
        pull("me/none")
    with pytest.raises(HubError, match=r"look up me/Tiny.*HTTP 404"):
        pull(REPO, revision="w8")
    with pytest.raises(FileNotFoundError, match=r"neither a folder with fbqat.json nor was it downloaded"):
        pull(REPO, offline=True)
    with pytest.raises(FileNotFoundError, match=r"has no fbqat.json, so what belongs into it is not known"):
        verify(str(run))
    with pytest.raises(FileExistsError, match="exists and is no pulled model"):
        pull(REPO, tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="look up me/secret: HTTP 401"):
        pull("me/secret")
    published.repositories[REPO].gated = "auto"
    with pytest.raises(HubError, match="the repository is gated: ask for access on its page"):
        pull(REPO)
    published.close()
    point_client_at(published, tmp_path / "home", monkeypatch)
    with pytest.raises(HubError, match=r"look up me/Tiny.*the connection was lost \(ConnectError\); run the same"):
        pull(REPO)


def test_no_bundle_no_pipeline(published: LoopbackHub, run: Path, tmp_path: Path) -> None:
    publish(run, "me/two", device_repo=True)
    with pytest.raises(ValueError, match="me/two has no HTP bundle; look for e\\.g\\. me/two-QNN-SM8750"):
        pull("me/two", tmp_path / "a", use="htp")
    pull("me/two-QNN-SM8750", tmp_path / "b", use="htp")
    with pytest.raises(ValueError, match="no diffusers pipeline; pull it with --for htp"):
        pull("me/two-QNN-SM8750", tmp_path / "b", use="diffusers")
