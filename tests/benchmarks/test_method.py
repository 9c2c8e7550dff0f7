"""The method benchmark's harness: rates are bracketed, the best is chosen on validation, the report's numbers."""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.method.__main__ import RESULTS, add, installed, main, read, run_method
from benchmarks.method.findings import Side
from benchmarks.method.report import budgets, forms, page, paired, table
from benchmarks.method.rows import FAMILIES, OURS, Results
from benchmarks.method.runs import METHODS, RECIPES, TRACKS, VARIANTS, Bench, Remembered, Setting, narrow_inputs
from fbqat_hub.evaluation.results import METHODS as TITLES
from fbqat_hub.families import get_family
from fbqat_hub.quantization import ActivationScheme, WeightScheme, prepare, set_bit_width
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import load_recipe
from tests.conftest import TRAINED


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "rates": (1e-4, 2e-4),
            "seeds": [1, 2, 3],
            "steps": 400,
            "fixed_rates": False,
            "no_pictures": False,
            **changes,
        }
    )


class Recorder:
    """Stands for the bench: a parabola in the logarithm of the rate."""

    def __init__(self, best: float) -> None:
        self.best = best
        self.settings: list[Setting] = []
        self.pictured: list[Setting] = []

    def __call__(self, setting: Setting, pictures: bool) -> dict[str, Any]:
        (self.pictured if pictures else self.settings).append(setting)
        return {"validation": abs(torch.tensor(setting.rate / self.best).log().item())}


@pytest.mark.parametrize(
    ("best", "rates"),
    [(1e-4, [1e-4, 2e-4, 5e-5]), (4e-4, [1e-4, 2e-4, 4e-4, 8e-4]), (1e-6, [1e-4, 2e-4, 5e-5, 2.5e-5])],
)
def test_rates_are_bracketed_at_the_first_seed(best: float, rates: list[float]) -> None:
    recorder = Recorder(best)
    run_method(recorder, "sana", "w4a8", "vqat", options())
    assert [(setting.rate, setting.seed) for setting in recorder.settings] == [(pytest.approx(r), 1) for r in rates]
    nearest = min(rates, key=lambda rate: abs(torch.tensor(rate / best).log().item()))
    drawn = [(setting.rate, setting.seed) for setting in recorder.pictured]
    assert drawn == [(pytest.approx(nearest), seed) for seed in (1, 2, 3)]


def test_without_pictures_none_are_drawn() -> None:
    recorder = Recorder(1e-4)
    run_method(recorder, "sana", "w4a8", "vqat", options(no_pictures=True))
    assert not recorder.pictured
    assert {setting.seed for setting in recorder.settings} == {1, 2, 3}


def test_fixed_rates_are_not_continued() -> None:
    recorder = Recorder(1e-6)
    run_method(recorder, "sana", "w4a8", "vqat", options(fixed_rates=True, seeds=[1]))
    assert [setting.rate for setting in recorder.settings] == [1e-4, 2e-4]


def test_one_fixed_rate_runs_once_a_seed() -> None:
    recorder = Recorder(1e-4)
    run_method(recorder, "sana", "w4a8", "vqat", options(rates=[1e-4], fixed_rates=True, seeds=[1, 2]))
    assert (recorder.settings, [setting.seed for setting in recorder.pictured]) == ([], [1, 2])


def test_ptq_runs_once() -> None:
    seen: list[Setting] = []
    run_method(lambda setting, _: seen.append(setting) or {"validation": 1.0}, "sana", "w4a8", "ptq-mse", options())
    assert [(setting.rate, setting.steps, setting.seed) for setting in seen] == [(0.0, 0, 1)]


@pytest.mark.parametrize(
    ("method", "track"), [*((name, "w4a8") for name in [*METHODS, *VARIANTS]), *(("fbqat", name) for name in TRACKS)]
)
def test_every_setting_is_a_valid_recipe_that_keeps_the_method(method: str, track: str) -> None:
    recipe = Setting(family="sana", track=track, method=method, steps=7, rate=3e-4, seed=5).recipe()
    assert recipe.method == {**METHODS, **VARIANTS}[method].preset
    own = {**METHODS, **VARIANTS}[method]
    if recipe.training == "end_to_end":  # blocks have steps of their own
        assert recipe.steps == (0 if not own.trained else 3 if own.halved else 7)
    assert recipe.seed == 5
    config = recipe.config()
    assert config.weight_bits == recipe.bit_schedule().final_bits == (3 if track.endswith("w3a8") else 4)
    assert config.activation_range == ("static" if "static" in track else "per_token")
    assert recipe.optimizer.learning_rate_schedule == ("constant" if track == "constant" else "cosine")


def test_every_family_and_method_has_its_place() -> None:
    assert set(RECIPES) == {name for name in TRAINED if get_family(name).takes_tensors}
    assert set(METHODS) == set(TITLES) - {"teacher"}


def row(
    method: str, rate: float, seed: int, test: float, validation: float | None = None, **more: Any
) -> dict[str, Any]:
    plain = {
        "family": "sana",
        "track": "w4a8",
        "method": method,
        "steps": 400 if rate else 0,
        "rate": rate,
        "seed": seed,
    }
    return {**plain, "test": test, "validation": test if validation is None else validation, **more}


ROWS = [
    row("ptq-mse", 0.0, 1, 0.05),
    row("lsq-qat", 1e-4, 1, 0.020, validation=0.030),
    row("lsq-qat", 2e-4, 1, 0.021, validation=0.025),
    row("lsq-qat", 2e-4, 2, 0.019),
    row(OURS, 1e-4, 1, 0.0189),
    row(OURS, 1e-4, 2, 0.0171),
]


def test_best_rate_is_chosen_on_validation_not_on_test() -> None:
    chosen = Results(ROWS).at_best(family="sana", method="lsq-qat")
    assert [(found["rate"], found["seed"]) for found in chosen] == [(2e-4, 1), (2e-4, 2)]


def test_what_a_method_trains_is_chosen_on_validation_too() -> None:
    """Of two seeds, the blocks' rows only where they were better at the first one on validation."""
    blocks = [row("lsq-qat", 1e-4, seed, 0.012, validation=0.024, track="train-blocks") for seed in (1, 2)]
    worse = row(OURS, 1e-4, 1, 0.001, validation=0.9, track="train-blocks")
    lines = table(Results([*ROWS, *blocks, worse]).named(), "test", 1e3, "{:.2f}").splitlines()
    assert "| QAT, learned step size (LSQ) | **12.00 ± 0.00 (blocks, 1e-04↕)** |" in lines
    assert "| LSQ from GPTQ codes, soft staircase | 18.00 ± 1.27 (1e-04↕) |" in lines


def test_longer_budgets_stand_beside_the_short_one() -> None:
    longer = row(OURS, 5e-5, 1, 0.015, steps=1600)
    lines = budgets(Results([*ROWS, longer, row("vqat", 1e-4, 1, 0.03)])).splitlines()
    assert lines[4:] == [
        "| method | Sana, 400 steps | Sana, 1600 steps |",
        "|---|---|---|",
        "| LSQ from GPTQ codes, soft staircase | 18.00 (1e-04↕) [2] | 15.00 (5e-05↕) [1] |",
    ]
    assert budgets(Results(ROWS)) == ""


def test_groups_are_compared_with_torchao_s() -> None:
    ours = row(OURS, 1e-4, 1, 0.009, track="train-blocks-groups")
    theirs = row("torchao-qat", 1e-4, 1, 0.010, track="train-blocks")
    lines = table(Results([*ROWS, ours, theirs]).named("groups"), "test", 1e3, "{:.2f}").splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["10.00 (blocks, 1e-04↕)", "**9.00 (blocks, 1e-04↕)**"]


def test_table_has_mean_spread_and_rate_and_the_best_is_bold() -> None:
    lines = table(Results(ROWS), "test", 1e3, "{:.2f}").splitlines()
    assert lines[0] == "| method | Sana |"
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "50.00",
        "20.00 ± 1.41 (2e-04↑)",
        "**18.00 ± 1.27 (1e-04↕)**",
    ]


def test_paired_differences_are_seed_by_seed_against_the_strongest() -> None:
    text = paired(Results(ROWS))  # -10% at both seeds
    assert "| Sana | QAT, learned step size (LSQ) | -10.0% (-10.0 to -10.0) | -10.0, -10.0 |" in text
    stronger = row("torchao-qat", 1e-4, 2, 0.018, bits_per_weight=5.0)  # at one seed and more bits: both are shown
    small = [{**each, "bits_per_weight": 4.2} for each in ROWS]
    lines = paired(Results([*small, stronger])).splitlines()[-2:]
    assert "| Sana | torchao's QAT, groups of 32 (5.0 bits) | -5.0% (one seed) | -5.0 |" in lines[0]
    assert "| Sana | QAT, learned step size (LSQ) (4.2 bits) | -10.0% (-10.0 to -10.0) | -10.0, -10.0 |" in lines[1]
    pictures = [
        row("lsq-qat", 1e-4, 1, 1, psnr=27.0),
        row("vqat", 1e-4, 1, 1, psnr=26.0),
        row(OURS, 1e-4, 1, 1, psnr=28.5),
    ]
    assert "| PSNR | Sana | QAT, learned step size (LSQ) | +1.50 dB (one seed) | +1.50 |" in paired(Results(pictures))


def test_forms_are_compared_at_the_same_seeds() -> None:
    rows = [*ROWS, row("lsq-gptq", 1e-4, 1, 0.0189 * 1.05), row("lsq-gptq", 1e-4, 3, 9.0)]
    lines = forms(Results(rows)).splitlines()
    assert lines[-1] == "| lsq-gptq | +5.0 (1) |"
    assert lines[-2] == "| lsq-qat | +11.1 (2) |"  # 21 over 18.9 and 19 over 17.1
    assert forms(Results(ROWS)) == ""


def test_page_of_no_results_and_of_some() -> None:
    assert "## W4A8" not in page(Results([]))
    assert "## W4A8, dynamic activations, annealed learning rate, 400 steps" in page(Results(ROWS))


def test_tracked_results_have_every_family_and_one_row_a_setting() -> None:
    for path in RESULTS.glob("*.json"):
        rows = read(path)
        keys = [tuple(found[name] for name in ("track", "method", "steps", "rate", "seed")) for found in rows]
        assert len(set(keys)) == len(keys) > 0
        assert {found["family"] for found in rows} == {path.stem}
        assert all(found["command"] and found["versions"]["torch"] and found["machine"]["cpu"] for found in rows)


def test_rows_are_added_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "sana.json"
    first, second = row("vqat", 1e-4, 1, 0.02), row("vqat", 1e-4, 2, 0.02)
    add(file, first)
    add(file, second)
    assert read(file) == [first, second]
    assert [path.name for path in file.parent.iterdir()] == ["sana.json"]


def test_a_row_takes_the_place_of_the_same_runs_older_one(tmp_path: Path) -> None:
    file = tmp_path / "sana.json"
    add(file, row("vqat", 1e-4, 1, 0.02))
    add(file, row("vqat", 1e-4, 2, 0.02))
    with_pictures = {**row("vqat", 1e-4, 1, 0.02), "pictures": 768}
    add(file, with_pictures)
    assert read(file) == [row("vqat", 1e-4, 2, 0.02), with_pictures]


class Doubler(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self.calls += 1
        return (2 * hidden_states,)


@pytest.mark.parametrize("activation_range", ["per_token", "static"])
def test_inputs_of_four_bits_have_15_or_16_values_a_scale(activation_range: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(200, 200))
    prepare(model, WeightScheme(), ActivationScheme(range=activation_range))
    model[0].set_input_range(0.2, 7)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(200))  # lets its inputs through
        model[0].bias.zero_()
    set_bit_width(model, 8)
    x = torch.linspace(-1, 1, 200).repeat(2, 1)
    assert len(model(x)[0].unique()) > 16 * (activation_range == "per_token")
    narrow_inputs(model)
    assert len(model(x)[0].unique()) == (15 if activation_range == "per_token" else 11)
    with pytest.raises(ValueError, match="activation bits is 4; allowed: 8, 16, 32"):
        ActivationScheme(bits=4)


def test_the_teacher_is_asked_once_for_each_batch_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draws, "training", lambda *_: {"hidden_states": torch.ones(2)})
    teacher, split = Doubler(), object()
    draws = Remembered(teacher, get_family("sana"), None, {}, 1)
    inputs = draws.training(split, 0, 2)
    assert draws.training(split, 0, 2) is inputs
    assert draws.predict(teacher, inputs).tolist() == draws.predict(teacher, inputs).tolist() == [2, 2]
    assert teacher.calls == 1
    for size in (3, 4):  # not kept: the second may have the id of the first
        passing = {"hidden_states": torch.ones(size)}
        assert len(draws.predict(teacher, passing)) == size
        del passing
    assert teacher.calls == 3


def test_torchao_is_left_out_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "benchmarks.method.torchao_qat", raising=False)
    hint = "method 'torchao-qat' needs torchao: pip install 'fbqat-hub[torchao]'"
    assert installed(["vqat", "torchao-qat", "fbqat"]) == ["vqat", "fbqat"]
    assert capsys.readouterr().err == f"Left out: {hint}\n"
    assert installed(["vqat"]) == ["vqat"]
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match=re.escape(hint)):
        main(["--methods", "torchao-qat"])
    prepare: Any = METHODS["torchao-qat"].prepare
    with pytest.raises(ImportError, match=re.escape(hint)):
        prepare(None, None, None, None)


@pytest.mark.slow
def test_short_form_runs_every_method_and_does_not_repeat_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--short", "--families", "sana", "--output", str(tmp_path)]
    methods = set(METHODS) - (set() if find_spec("torchao") else {"torchao-qat"})
    main(arguments)
    rows = read(tmp_path / "sana.json")
    assert {found["method"] for found in rows} == methods
    assert all(0 < found["validation"] < 1 for found in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(methods)
    main(arguments)
    assert json.loads((tmp_path / "sana.json").read_text()) == rows
    assert capsys.readouterr().out == ""


def test_recipes_of_the_families_differ_in_what_the_family_needs_only() -> None:
    recipes = {family: load_recipe(name) for family, name in RECIPES.items()}
    for family, recipe in recipes.items():
        assert recipe.family == family
        assert (recipe.steps, recipe.batch_size, recipe.dataset) == (400, 8, recipes["sana"].dataset)


# From the lowest loss to the highest: track, method, rate on FLUX.1, and the least gap to the next. The gaps are half
# of those measured; the standard deviation of a method's loss over three seeds is below 1% there.
ORDER = (
    ("mixed-4.5", "fbqat", 1e-4, 0.17),
    ("uniform-4", "fbqat", 1e-4, 0.05),
    ("uniform-4", "lsq-qat", 1e-4, 0.13),
    ("uniform-4", "vqat", 1e-4, 0.05),
    ("uniform-4", "ptq-gptq", 0.0, 0.3),
    ("uniform-4", "ptq-mse", 0.0, 0.0),
)


@pytest.mark.slow
def test_order_of_the_methods() -> None:
    """Half a bit on average, the default, LSQ, vanilla QAT, GPTQ, nearest codes: one family and seed, on the judge."""
    bench, losses = Bench("flux"), []
    for track, method, rate, _ in ORDER:
        setting = Setting(family="flux", track=track, method=method, steps=400 if rate else 0, rate=rate, seed=1)
        losses.append(bench.measure(setting, pictures=False)["sampler"])
    for (_, method, _, gap), lower, higher in zip(ORDER, losses, losses[1:], strict=False):
        assert lower < (1 - gap) * higher, method


def test_the_rows_are_in_that_order_in_every_family_that_has_them() -> None:
    results, seen = Results.load(), []
    for family in FAMILIES:
        sides = [Side(track, method, 400 if rate else 0) for track, method, rate, _ in ORDER]
        found = [side.rows(results, family, "sampler").get(1) for side in sides]
        losses = [row["sampler"] for row in found if row]
        assert losses == sorted(losses)
        seen += [family] * all(found)
    assert "flux" in seen
