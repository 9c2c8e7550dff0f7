"""The list: published models by tag, downloaded ones, runs; what is not known is left empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbqat_hub import cli
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.hub.listing import downloaded, published, runs
from fbqat_hub.hub.publish import publish
from fbqat_hub.hub.pull import pull
from tests.hub.conftest import REPO, write_run
from tests.hub.server import LoopbackHub


def test_published_downloaded_and_runs(hub: LoopbackHub, run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    psnr = Record(suite="method", family="sana", method="fbqat", metric="psnr", value=24.527, n=4, seed=0)
    write_records(run / "results.json", [psnr])
    publish(run, REPO)
    publish(write_run(tmp_path / "other"), "lab/Tiny", private=True)
    hub.add("somebody/art", {"README.md": b"---\ntags: [art]\n---\n"})
    pull(REPO)
    (tmp_path / "runs" / "not-one").mkdir(parents=True)
    run.rename(tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["model", "where", "family", "bits", "size", "measured"]
    rows = {(row[0], row[1]): row[2:] for row in lines[1:]}
    assert set(rows) == {(REPO, "Hub"), ("lab/Tiny", "private"), ("runs/tiny", "run"), (REPO, "cache")}
    assert rows[REPO, "Hub"][:2] == ["sana", "W4A8"]
    assert rows[REPO, "Hub"][4:] == ["held-out", "distillation", "loss", "0.0125"]  # of the card
    assert rows["runs/tiny", "run"][4:] == ["PSNR", "to", "the", "teacher", "24.53"]
    assert [model.name for model in published("lab")] == ["lab/Tiny"]
    assert downloaded()[0].size > 0
    assert [model.bits for model in runs(tmp_path / "runs")] == ["W4A8"]


def test_a_pulled_model_whose_manifest_is_damaged_is_listed_with_the_others(hub: LoopbackHub, run: Path) -> None:
    publish(run, REPO)
    folder = pull(REPO).folder
    (folder / "fbqat.json").unlink()
    (folder / "fbqat.json").write_text("{")
    assert [(model.name, model.where, model.bits) for model in downloaded()] == [(REPO, "cache", "")]


def test_local_ones_are_shown_without_a_hub(hub: LoopbackHub, run: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run.parent)
    hub.fail("models", 503, times=100)
    assert cli.main(["list", "--runs", "."]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[:4] == ["run", "run", "sana", "W4A8"]
    assert "fbqat: error: list the Hub's models: HTTP 503" in err
    hub.requests.clear()
    assert cli.main(["list", "--runs", ".", "--local"]) == 0
    assert hub.requests == []


@pytest.mark.parametrize(
    "front",
    [
        "tags: [fbqat]",
        'tags: [fbqat, 5, null, "\\e[31mred"]',
        "tags: [fbqat]\nmodel-index: [{name: x, results: [{task: {type: t}, dataset: {name: d, type: d}, "
        "metrics: [{type: psnr, value: 25.9 dB}]}]}]",
        "tags: [fbqat]\nmodel-index: {a: 1}",
    ],
)
def test_a_card_that_is_no_card_of_ours(front: str, hub: LoopbackHub) -> None:
    """Anybody may give a model our tag; theirs must not hide the others."""
    hub.add("you/x", {"README.md": f"---\n{front}\n---\n".encode()})
    (model,) = published()
    assert (model.name, model.family, model.bits, model.metric) == ("you/x", "", "", "")
