"""Records: validation, the flat JSON form, merging, and that a write is all or nothing."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fbqat_hub.evaluation.results import (
    Record,
    command_line,
    machine,
    read_records,
    versions,
    write_records,
)
from tests.conftest import subprocess_environment


def record(**changes) -> Record:
    given = {
        "suite": "method",
        "family": "sana",
        "method": "fbqat",
        "metric": "psnr",
        "value": 30.5,
        "n": 64,
        "seed": 0,
    }
    return Record(**{**given, "spread": 2.5, "command": "fbqat evaluate runs/sana", **changes})


def test_a_record_fills_in_what_can_be_known_here() -> None:
    made = record()
    assert made.unit == "dB"
    assert made.versions["torch"]
    assert made.versions["fbqat_hub"]
    assert made.machine["cpu"]
    assert made.machine["cores"] >= 1
    assert made.date.startswith("20")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "fbqat-papr"}, "Did you mean 'fbqat-paper'"),
        ({"metric": "fid"}, "Unknown metric 'fid'"),
        ({"suite": "methods"}, "Did you mean 'method'"),
        ({"unit": "bits"}, "recorded in 'dB'"),
        ({"value": math.inf}, "one finite number"),
        ({"value": math.nan}, "one finite number"),
        ({"value": True}, "one finite number"),
        ({"spread": -1.0}, "spread"),
        ({"interval": (30.0, math.nan)}, "interval of psnr .* two finite numbers"),
        ({"interval": 30.0}, "interval of psnr is 30.0"),
        ({"interval": (31.0, 30.0)}, "low is above high"),
        ({"n": 0}, "n of psnr is 0"),
        ({"n": 2.0}, "n of psnr is 2.0"),
        ({"seed": -1}, "seed of psnr is -1"),
        ({"date": "yesterday"}, "ISO 8601"),
        ({"family": "Sana"}, "lower-case"),
        ({"extra": {"value": 1}}, "extra holds value"),
    ],
)
def test_wrong_fields_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        record(**changes)


def test_records_come_back_as_written_with_their_extra_fields_flat(tmp_path: Path) -> None:
    made = [record(extra={"extractor": "openmoji-cnn-1"}, metric="fd_teacher"), record()]
    path = write_records(tmp_path / "new" / "results.json", made)
    assert json.loads(path.read_text())[0]["extractor"] == "openmoji-cnn-1"
    assert read_records(path) == made


def test_writing_replaces_the_same_measurement_and_keeps_the_others_in_place(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_records(path, [record(), record(metric="ssim", value=0.9)])
    write_records(path, [record(value=31.0), record(seed=1)])
    assert [(r.metric, r.seed, r.value) for r in read_records(path)] == [
        ("psnr", 0, 31.0),
        ("ssim", 0, 0.9),
        ("psnr", 1, 30.5),
    ]


def test_an_interval_is_kept_and_files_from_before_it_read_and_write_as_they_were(tmp_path: Path) -> None:
    path = write_records(tmp_path / "results.json", [record(interval=(29.5, 31.5)), record(metric="ssim")])
    rows = json.loads(path.read_text())
    assert rows[0]["interval"] == [29.5, 31.5]
    assert "interval" not in rows[1]
    assert [r.interval for r in read_records(path)] == [(29.5, 31.5), None]

    tracked = Path(__file__).parents[2] / "benchmarks" / "results" / "method.json"
    copy = write_records(tmp_path / "copy.json", read_records(tracked))
    assert json.loads(copy.read_text()) == json.loads(tracked.read_text())


def test_records_that_the_new_ones_make_wrong_are_dropped(tmp_path: Path) -> None:
    path = write_records(tmp_path / "results.json", [record(), record(seed=1), record(metric="ssim", value=0.9)])
    write_records(path, [record(metric="lpips", value=0.1)], drop=lambda r: r.metric == "psnr" and r.seed == 0)
    assert [(r.metric, r.seed) for r in read_records(path)] == [("psnr", 1), ("ssim", 0), ("lpips", 0)]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_records(tmp_path / "results.json", [record()])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_records(path, [record(seed=1, extra={"picture": object()})])

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_records(path, [record(seed=1)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "is not JSON"),
        ("{}", "a list of records"),
        ('[{"suite": "method"}]', "record 0: A record lacks command, date"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_records(path)
    assert "results.json" in str(caught.value)


def test_a_broken_record_is_named_by_position(tmp_path: Path) -> None:
    rows = [record().to_dict(), {**record().to_dict(), "metric": "fid"}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="record 1: Unknown metric 'fid'"):
        read_records(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("family", 3), ("command", ["x"]), ("machine", None), ("versions", []), ("versions", {"torch": None})],
)
def test_a_field_of_the_wrong_kind_is_named(name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([{**record().to_dict(), name: value}]))
    with pytest.raises(ValueError, match=rf"results\.json, record 0: {name} of psnr is .*needed"):
        read_records(tmp_path / "results.json")


def test_a_module_is_named_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    code = "from fbqat_hub.evaluation.results import command_line; print(command_line())"
    for name in ("__init__.py", "__main__.py", "part.py"):
        (tmp_path / "measured" / name).write_text(code if name != "__init__.py" else "")
    for module in ("measured", "measured.part"):
        command = [sys.executable, "-m", module, "--to", str(tmp_path / "x"), "a b"]
        done = subprocess.run(command, cwd=tmp_path, env=subprocess_environment(), capture_output=True, text=True)
        assert done.stdout == f"python -m {module} --to x 'a b'\n", done.stderr


def test_nothing_of_this_machine_beyond_its_hardware_is_written() -> None:
    here = Path.cwd()
    text = json.dumps(
        replace(
            record(),
            command=command_line(
                [str(here / "fbqat"), "card", str(here / "run"), f"--data={here / 'x.yaml'}", f"steps={here / 'a=b'}"]
            ),
        ).to_dict()
    )
    assert "fbqat card run --data=x.yaml steps=a=b" in text
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in json.dumps(machine())
    assert set(versions()) >= {"python", "torch", "fbqat_hub"}
