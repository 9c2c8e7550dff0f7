"""optimum: what `optimum-cli export qnn` does; `integrations/optimum/` registers it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.families import family_of
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.untrusted import read_yaml


def export_qnn(
    model: str,
    output: Path,
    *,
    soc: str = "sm8750",
    precision: str = "w4a8",
    a16: Sequence[str] = (),
    graphs: int = 1,
    prompts: Path | None = None,
    images: int = 2,
) -> None:
    """Load a packed pipeline and export it as a bundle; what `fbqat export --prompts` does.

    Ranges that training did not set are calibrated on what the pipeline feeds its denoiser while it draws the prompts.

    Args:
        model: folder or Hub id. Arguments of its call, and its prompts, come from its `recipe.yaml`, if it has one.
        prompts: text file, one a line, at least two; the recipe's if None.

    Raises:
        SystemExit: with status 1 and one line that says what failed and what to do.
    """
    saved = Path(model) / "recipe.yaml"
    recipe = read_yaml(saved) if saved.is_file() else {}
    texts = [line.strip() for line in prompts.read_text().splitlines()] if prompts else recipe.get("prompts", [])
    texts = [text for text in texts if text]
    try:
        if len(texts) < 2:
            raise ExportError("calibration needs at least two prompts: --prompts FILE, one a line")
        pipeline = load_pipeline(model, torch.float32)
        certificate = export_bundle(
            pipeline,
            output,
            prompts=texts,
            call=recipe.get("generation") or family_of(type(pipeline).__name__).native_size(pipeline),
            soc=soc,
            precision=precision,
            a16=a16,
            graphs=graphs,
            pictures=min(images, len(texts)),
        )
    except (ExportError, OSError, ValueError) as error:
        sys.exit(f"optimum-cli export qnn: error: {' '.join(str(error).split())}")
    measured = certificate["parity"]["emulator_vs_torch_packed"]["sqnr_db"]
    print(f"emulator vs torch: SQNR {measured:.1f} dB. Saved {output}. Ran on: x86 emulator. Never ran on: a phone.")
