"""The tiny teachers that have a graph, quantized without training, as bundles for a Snapdragon: parity, pictures, cost.

python -m benchmarks.htp_bundles --work runs/htp                       # -> benchmarks/results; go on: same command
python -m benchmarks.htp_bundles --work runs/htp --recipes sana-tiny --precisions auto

A family and precision that is done is not made again; remove its folder under --work to have it anew. "auto-31" is
auto with a target of 31 dB, which leaves 30 on other inputs; a family that has no such graph is said and left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.bundle.pipeline import picture_psnr
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export_run import export_run
from fbqat_hub.families import FAMILIES
from fbqat_hub.training.distill import train
from fbqat_hub.training.recipe import load_recipe

RESULTS = Path(__file__).parent / "results"
CERTIFICATES = RESULTS / "certificates"
RECIPES = [family.tiny for family in FAMILIES.values() if family.tiny and not family.without_graph]
PRECISIONS: dict[str, dict[str, Any]] = {
    "w4a8": {"precision": "w4a8"},
    "auto": {"precision": "auto"},
    "auto-31": {"precision": "auto", "target_db": 31.0},
}
METHOD = "ptq-gptq"


def bundle(run: Path, folder: Path, precision: str) -> dict[str, Any]:
    """The certificate of the bundle of ``run`` in ``folder``, which is made unless it is there."""
    if not (folder / "certificate.json").exists():
        export_run(run, folder, **PRECISIONS[precision])
    certificate: dict[str, Any] = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    return certificate


def runner_psnr(folder: Path, picture: Path, *arguments: str) -> float:
    """PSNR in dB to torch's of the first prompt's picture by the bundle's own runner, in a process alone."""
    subprocess.run([sys.executable, folder / "generate.py", "--output", picture, *arguments], check=True)
    ours, reference = (np.asarray(Image.open(path)) for path in (picture, folder / "pictures" / "0-torch.png"))
    return picture_psnr(reference, ours)


def compared(parity: dict[str, Any]) -> dict[str, Any]:
    """SQNR and cosine of each of the three comparisons."""
    return {
        name: {key: value[key] for key in ("sqnr_db", "cosine")} for name, value in parity.items() if "_vs_" in name
    }


def record(certificate: dict[str, Any], family: str, seed: int, precision: str, runner: dict[str, float]) -> Record:
    """One record a bundle: the SQNR of the emulator to torch, and beside it everything else that was measured."""
    parity = certificate["parity"]
    return Record(
        suite="htp",
        family=family,
        method=METHOD,
        metric="sqnr_db",
        value=parity["emulator_vs_torch_packed"]["sqnr_db"],
        n=parity["held_out_inputs"],
        seed=seed,
        extra={
            "precision": precision,
            "parity": compared(parity),
            "blocks": {
                name: compared(each)["emulator_vs_torch_packed"] for name, each in certificate["blocks"].items()
            },
            "graphs": {name: compared(each["parity"]) for name, each in certificate["graphs"].items()},
            "text_left_out": certificate["text_left_out"],
            "pictures_psnr_db": certificate["pictures"]["mean_psnr_db"],
            "runner_psnr_db": runner,
            "cost": certificate["cost"],
            "allocation": certificate["allocation"],
            "export_seconds": round(sum(certificate["seconds"].values()), 1),
        },
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the packed models and their bundles")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="default: all")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    CERTIFICATES.mkdir(parents=True, exist_ok=True)
    for name in options.recipes:
        recipe = load_recipe(name, method=METHOD, steps=0)
        run = train(recipe, options.work / name / "packed", resume=True)
        for precision in options.precisions:
            folder = options.work / name / precision
            print(f"== {name}, {precision}")
            try:
                certificate = bundle(run, folder, precision)
            except ExportError as error:
                if "target_db" not in str(error):
                    raise
                print(f"   {error}")
                continue
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            pictures = options.work / name
            runner = {"prompt": runner_psnr(folder, pictures / f"{precision}-prompt.png")}
            if manifest["text"]:
                runner["text"] = runner_psnr(
                    folder, pictures / f"{precision}-text.png", "--text", manifest["prompts"][0]
                )
            made = record(certificate, recipe.family, recipe.seed, precision, runner)
            write_records(RESULTS / "htp.json", [made])
            shutil.copyfile(folder / "certificate.md", CERTIFICATES / f"{recipe.family}-{precision}.md")
            print(f"   SQNR to torch {made.value:.1f} dB, the runner's pictures {runner} dB")


if __name__ == "__main__":
    main()
