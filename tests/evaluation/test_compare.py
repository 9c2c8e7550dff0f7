"""`compare`: table, results file and sheet of two folders."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fbqat_hub.evaluation.compare import compare, table


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Pictures of one grey, and the same lighter by 51/255 = 0.2; one more in each."""
    for folder, level, extra in (("a", 100, "8"), ("b", 151, "9")):
        (tmp_path / folder).mkdir()
        for name in ("1", "2", "3", extra):
            Image.new("RGB", (24, 24), (level,) * 3).save(tmp_path / folder / f"{name}.png")
    return tmp_path / "a", tmp_path / "b"


def test_table_file_and_sheet(folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    rows = compare(*folders, tmp_path / "out")
    assert f"left out, without a partner: 1 of {folders[0]}, 1 of {folders[1]}" in capsys.readouterr().err
    by_name = {row["metric"]: row for row in rows}
    assert by_name["psnr"]["value"] == pytest.approx(20 * -torch.tensor(0.2).log10().item())
    assert by_name["psnr"]["interval"] == pytest.approx((13.979, 13.979), abs=1e-3)
    assert by_name["fd"]["extractor"] == "openmoji-cnn-1"
    lines = table(rows).splitlines()
    assert lines[0].split() == ["metric", "of", "value", "95%", "interval", "n"]
    assert lines[1].split() == ["psnr", "↑", "a", "to", "b", "13.98", "dB", "13.98", "to", "13.98", "3"]
    assert lines[3].split()[:2] == ["fd", "↓"]
    assert lines[3].split()[-2:] == ["–", "3"]

    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (saved["a"], saved["b"], saved["without_partner"]) == ("a", "b", {"a": 1, "b": 1})
    assert [row["metric"] for row in saved["metrics"]] == ["psnr", "ssim", "fd"]
    assert saved["versions"]["torch"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.json", "comparison.png"]
    sheet = Image.open(tmp_path / "out" / "comparison.png")
    colours = {colour for _, colour in sheet.getcolors(10**6)}
    assert {(100, 100, 100), (151, 151, 151)} <= colours


def test_a_folder_compared_with_itself_has_no_psnr(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = compare(folders[0], folders[0], tmp_path / "out", ["psnr", "ssim"])
    assert [(row["value"], row["n"]) for row in rows] == [(None, 0), (1.0, 4)]
    lines = table(rows).splitlines()
    assert lines[1].split() == ["psnr", "↑", "a", "to", "b", "not", "measured", "–", "0"]
    assert lines[-1] == "psnr: not measured: all 4 pairs are equal, and the PSNR of equal pictures is infinite"
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())["metrics"][0]
    assert (saved["value"], saved["why"]) == (None, "all 4 pairs are equal, and the PSNR of equal pictures is infinite")


def test_equal_pairs_are_counted_and_one_pair_has_no_distance(folders: tuple[Path, Path]) -> None:
    a, b = folders
    Image.open(a / "1.png").save(b / "1.png")
    (row,) = compare(a, b, metrics=["psnr"])
    assert table([row]).splitlines()[1].endswith("2 (1 more are equal)")
    for name in ("2", "3"):
        (b / f"{name}.png").unlink()
    lines = table(compare(a, b, metrics=["ssim", "fd"])).splitlines()
    assert lines[-1].startswith("fd: not measured: a distance of two sets needs at least 2 pictures in each")


def test_wrong_input_is_refused_before_anything_is_written(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    with pytest.raises(ValueError, match="unknown metrics psnrr; known: psnr, ssim"):
        compare(a, b, tmp_path / "out", ["psnrr"])
    with pytest.raises(ValueError, match="no metrics to measure"):
        compare(a, b, tmp_path / "out", [])
    with pytest.raises(ValueError, match="device is 'gpu'; allowed: cpu"):
        compare(a, b, tmp_path / "out", device="gpu")
    with pytest.raises(NotADirectoryError, match=r"1\.png is a file; give a folder as --output"):
        compare(a, b, a / "1.png")
    with pytest.raises(ValueError, match=r"clip_score needs the prompt of each picture, in .*a/metadata.jsonl"):
        compare(a, b, tmp_path / "out", ["clip_score"])
    Image.new("RGB", (12, 24)).save(b / "2.png")
    with pytest.raises(ValueError, match=r"a/2.png is 24 x 24 pixels and .*b/2.png 12 x 24"):
        compare(a, b, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_of_two_prompts_are_not_compared_one_by_one(folders: tuple[Path, Path]) -> None:
    """Two runs that were evaluated on other prompts, whose pictures have the same names."""
    for folder, prompt in zip(folders, ("red heart", "a cat"), strict=True):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "2.png", "prompt": prompt}))
    with pytest.raises(ValueError, match=r"1 of 3 pictures have another prompt in .*b than in .*a, such as 2: 'red he"):
        compare(*folders, metrics=["fd", "psnr"])
    assert compare(*folders, metrics=["fd"])[0]["n"] == 3


def test_metrics_of_one_set_alone_are_measured_for_both(folders: tuple[Path, Path], monkeypatch) -> None:
    a, b = folders
    lines = [json.dumps({"file_name": f"{name}.png", "prompt": f"square {name}"}) for name in "123"]
    (a / "metadata.jsonl").write_text("\n".join(lines))
    asked = []

    def scores(files: list[Path], prompts: list[str], device: str) -> list[float]:
        asked.append(([file.parent.name for file in files], prompts))
        return [float(len(asked))] * len(files)

    monkeypatch.setattr("fbqat_hub.evaluation.learned.clip_scores", scores)
    rows = compare(a, b, metrics=["clip_score"])
    assert [(row["of"], row["value"], row["n"]) for row in rows] == [("a", 1.0, 3), ("b", 2.0, 3)]
    assert asked == [(["a"] * 3, ["square 1", "square 2", "square 3"]), (["b"] * 3, asked[0][1])]
