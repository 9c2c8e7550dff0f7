"""Shards: of bounded size, whole or made anew, mapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fbqat_hub.training import shards
from fbqat_hub.training.shards import Rows, Shard, fill


def numbers(items: range) -> Rows:
    """Three numbers an item, but none of the items from 32 to 64."""
    if items.start == 32:
        return Rows({}, ["gone"] * len(items))
    return Rows({"x": torch.arange(items.start, items.stop).float()[:, None].expand(-1, 3)}, [""] * len(items))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 32 * 3 * 4)  # two batches


def rows(found: list[Shard]) -> list[float]:
    return [value for shard in found if shard.tensors for value in shard.tensors["x"][:, 2].tolist()]


EXPECTED = [*map(float, range(32)), *map(float, range(64, 200))]


@pytest.mark.usefixtures("small")
def test_files_are_of_bounded_size_and_read_in_order(tmp_path: Path) -> None:
    found = fill(tmp_path, "numbers", 200, numbers)
    assert rows(found) == EXPECTED
    assert [(shard.first, shard.stop) for shard in found] == [(0, 96), (96, 160), (160, 200)]
    assert found[0].notes == [""] * 32 + ["gone"] * 32 + [""] * 32
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < shards.SHARD_BYTES + 1000
    assert rows(fill(tmp_path, "numbers", 200, lambda _: pytest.fail("nothing is missing"))) == EXPECTED


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["cut", "foreign", "renamed"])
def test_a_damaged_file_is_named_and_made_anew(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, "numbers", 200, numbers)
    path = tmp_path / "numbers-000000096.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "foreign":
        path.unlink()
        save_file({"x": torch.zeros(64, 3)}, path)
    else:
        path.write_bytes((tmp_path / "numbers-000000000.safetensors").read_bytes())
    made = []
    found = fill(tmp_path, "numbers", 200, lambda items: [made.append(items), numbers(items)][1])
    assert rows(found) == EXPECTED
    assert made == [range(96, 128), range(128, 160)]
    assert "numbers-000000096.safetensors is damaged" in capsys.readouterr().err


def test_nothing_can_be_made_of_any_item(tmp_path: Path) -> None:
    (shard,) = fill(tmp_path, "numbers", 2, lambda items: Rows({}, ["gone"] * len(items)))
    assert (shard.tensors, shard.notes) == ({}, ["gone", "gone"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """64 MiB in four files, every row of which is read: what the process holds of its own stays below a tenth."""

    def own() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    size = 2**19
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 2**24)
        fill(tmp_path, "rows", 128, lambda items: Rows({"x": torch.ones(len(items), size // 4)}))
    before = own()
    found = fill(tmp_path, "rows", 128, lambda _: pytest.fail("nothing is missing"))
    assert sum(row.sum().item() for shard in found for row in shard.tensors["x"]) == 128 * size // 4
    assert own() - before < 6.4 * 2**20
