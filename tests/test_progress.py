"""A bar on a terminal, a plain line now and then in a log, and no bars of other libraries."""

from __future__ import annotations

import os
import sys

import datasets
import pytest

from fbqat_hub import progress
from fbqat_hub.progress import Progress, each, only_ours


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_percent_and_five_seconds(clock: list[float], capsys) -> None:
    with Progress("train", 100, "step") as stage:
        for step in range(100):
            clock[0] += 1 if step < 50 else 0.1
            stage.update(loss=f"{step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 10 of 100 steps, 10%, 10 s, about 90 s left, loss 9"
    assert [line.split()[1] for line in lines] == ["10", "20", "30", "40", "50", "100"]
    assert not any("\r" in line for line in lines)


def test_a_short_stage_is_one_line_and_nothing_to_do_is_none(clock: list[float], capsys) -> None:
    assert list(each("abc", "read", "file")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "read: 3 of 3 files, 100%, 0 s\n"
    for shown, items in ((True, ""), (False, "abc")):
        list(each(items, "read", "file", shown=shown))
    with Progress("train", 5, "step", start=5):
        pass
    with Progress("hash", 3_000_000, "B", start=1_000_000) as stage:
        stage.update(2_000_000)
    assert capsys.readouterr().err == "hash: 3.0 of 3.0 MB, 100%, 0 s\n"


def test_a_terminal_gets_one_bar_a_stage(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("train", 4, "step") as stage:
        for _ in range(4):
            stage.update(loss="1e-2")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "train: 100%" in shown
    assert "loss=1e-2" in shown


def test_several_processes_on_one_terminal_write_lines(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_bars", True)
    progress.plain_lines()
    assert list(each("ab", "read", "file")) == ["a", "b"]
    assert capsys.readouterr().err == "read: 2 of 2 files, 100%, 0 s\n"


def test_bars_of_other_libraries_are_off_for_a_while(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    rows = datasets.Dataset.from_dict({"a": list(range(10))})
    with only_ours():
        rows.map(lambda row: {"a": row["a"] + 1}, load_from_cache_file=False)
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"  # standard error is no terminal here
    assert "10/10" not in capsys.readouterr().err
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    rows.map(lambda row: {"a": row["a"] + 2}, load_from_cache_file=False)
    assert "10/10" in capsys.readouterr().err
