"""Tables of the families and of what works in other libraries."""

from __future__ import annotations

import textwrap
from collections import defaultdict

from benchmarks.markdown import markdown
from benchmarks.tables.results import RESULTS
from fbqat_hub.evaluation.results import read_records
from fbqat_hub.families import FAMILIES
from fbqat_hub.training.recipe import RECIPES, load_recipe

_ENCODERS = {"text encoders, float denoiser": "float", "text encoders, w4a8 denoiser": "W4A8"}
_SDNQ = "SDNQ, pictures against the packed pipeline's"


def text_encoders_table() -> str:
    """What quantized text encoders do to the pictures, by `benchmarks.text_encoders`."""
    records = [each for each in read_records(RESULTS / "integration.json") if each.extra.get("part") in _ENCODERS]
    families = list(dict.fromkeys(record.family for record in records))
    value = {(each.extra["part"], each.extra["precision"], each.family): each for each in records}
    rows = [
        [denoiser, precision, *(f"{value[part, precision, family].value:.1f}" for family in families)]
        for part, denoiser in _ENCODERS.items()
        for precision in dict.fromkeys(each.extra["precision"] for each in records if each.extra["part"] == part)
    ]
    return (
        f"{markdown(('denoiser', 'text encoders', *families), rows)}\n\n"
        f"PSNR in dB to the pictures of the float pipeline from the same seeds, mean of up to "
        f"{max(record.n for record in records)} pictures of 64 pixels; tiny pipelines, whose text encoders were "
        f"trained with the denoiser. The W4A8 denoiser is PTQ with MSE clip. By `{records[0].command}`."
    )


def sdnq_table() -> str:
    """Pictures drawn by SDNQ against ours, by `benchmarks.sdnq`."""
    records = [each for each in read_records(RESULTS / "integration.json") if each.extra.get("part") == _SDNQ]
    rows = [
        [
            record.family,
            f"{record.value:.1f}",
            str(record.extra["int8_layers"]),
            str(record.extra["float_activation_layers"]),
        ]
        for record in records
    ]
    head = ("family", "PSNR to the packed pipeline, dB", "layers with int8 products", "with float activations")
    one = records[0]
    return (
        f"{markdown(head, rows)}\n\n"
        f"Tiny pipelines at W4A8, mean of {one.n} pictures of 64 pixels from equal seeds, float32 on a CPU, sdnq "
        f"{one.versions['sdnq']}. By `{one.command}`."
    )


def _as_code(operation: str) -> str:
    return f"`{operation}`" if "(" in operation or "_" in operation else operation


def operations_table(part: str) -> str:
    """What works, operation by family, by `benchmarks.integration`."""
    found = [
        each
        for each in read_records(RESULTS / "integration.json")
        if (each.metric, each.extra.get("part")) == ("operations", part)
    ]
    by_family = {name: each for name in FAMILIES for each in found if each.family == name}
    operations = dict.fromkeys(operation for each in by_family.values() for operation in each.extra["cells"])
    shown: dict[str, str] = {}  # operation -> the error, of the first family that has one
    rows = []
    for operation in operations:
        row = [_as_code(operation)]
        for name, record in by_family.items():
            cell = record.extra["cells"].get(operation, {"state": "not yet measured"})
            row.append(cell["state"] + (f" ({cell['cosine']:.2f})" if "cosine" in cell else ""))
            if "error" in cell:
                shown.setdefault(operation, f"`{name}`: {textwrap.shorten(cell['error'], 200, placeholder=' ...')}")
        rows.append(row)
    head = ("operation", *(f"`{name}`" for name in by_family))
    errors = "".join(f"- {_as_code(operation)}, {error}\n" for operation, error in shown.items())
    errors = f"What is refused says:\n\n{errors}\n" if errors else ""
    record = next(iter(by_family.values()))
    return (
        f"{markdown(head, rows)}\n\n"
        f"{errors}"
        f"Tiny models of random weights on a CPU, diffusers {record.versions['diffusers']}, peft "
        f"{record.versions['peft']}, torch {record.versions['torch']}; {sum(each.n for each in found)} tests. By "
        f"`{record.command}`."
    )


def families_table() -> str:
    """What the package supports: a family a row, with the recipes that ship for it."""
    recipes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(RECIPES.glob("*.yaml")):
        if not path.stem.endswith("-tiny"):
            recipes[load_recipe(path).family].append(f"[{path.stem}](training/recipes/{path.name})")
    rows = []
    for name, family in FAMILIES.items():
        export = "no" if family.without_graph else "denoiser" if family.without_bundle else "bundle"
        tested = "trained tiny teacher" if family.tiny else "random weights"
        rows.append((f"`{name}`", f"`{family.pipeline_class}`", ", ".join(recipes[name]), export, tested))
    head = ("family", "pipeline", "recipes (real checkpoints: not yet run)", "HTP export", "tested with")
    return markdown(head, rows)
