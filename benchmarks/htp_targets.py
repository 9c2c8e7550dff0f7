"""The tiny Sana, quantized without training, as a bundle for each chip in one export: what was compiled and emulated.

python -m benchmarks.htp_targets --work runs/targets                        # -> benchmarks/results/htp.json
python -m benchmarks.htp_targets --work runs/targets --socs sm8650 sm8850   # these only; rows of others stay
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.htp_true_size import RESULTS
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.export.htp.targets import TARGETS
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import load_recipe

#: Steps of a picture: the two pictures are for calibration and comparison, not to be looked at.
STEPS = 4


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the packed model and the bundles; new")
    parser.add_argument("--socs", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("sana-tiny")
    pipeline = load_pipeline(convert_pipeline(recipe.teacher, options.work / "packed"))
    call = {**recipe.generation, "num_inference_steps": STEPS}
    made = export_bundle(
        pipeline, options.work / "bundles", prompts=recipe.prompts[:4], call=call, soc=options.socs, pictures=1
    )
    records = []
    for soc, certificate in made.items():
        graphs = [certificate, *certificate["graphs"].values()]
        extra = {
            "soc": soc,
            "compatibility_info": certificate["read_back"]["compatibility_info"],
            "graphs": len(graphs),
            "nodes_elsewhere": sum(each["coverage"]["nodes_elsewhere"] for each in graphs),
            "binary_bytes": sum(each["cost"]["binary_bytes"] for each in graphs),
            "ran_on": certificate["ran_on"],
            "emulator_vs_cpu_qdq_db": certificate["parity"]["emulator_vs_cpu_qdq"]["sqnr_db"],
            "pictures_psnr_db": certificate["pictures"]["mean_psnr_db"],
        }
        records.append(
            Record(
                suite="htp",
                family=recipe.family,
                method="ptq-maxabs",
                metric="sqnr_db",
                value=certificate["parity"]["emulator_vs_torch_packed"]["sqnr_db"],
                n=certificate["parity"]["held_out_inputs"],
                seed=0,
                extra=extra,
            )
        )
    print(f"saved {write_records(RESULTS, records).name}")


if __name__ == "__main__":
    main()
