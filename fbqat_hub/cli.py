"""The ``fbqat`` command: thin, one function a verb. The same verbs are functions of the library."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_EXAMPLES = """examples:
  fbqat demo                                          a tiny Sana: train, pack, compare, compile, card; all local
  fbqat train sana-tiny --output runs/tiny            quantize by fractional-bit quantization-aware training
  fbqat train my-recipe.yaml --output runs/mine --resume
  fbqat convert my-finetune/ --output mine-w4a8       quantize without training
  fbqat generate runs/tiny "red heart" --output heart.png
  fbqat evaluate runs/tiny && fbqat card runs/tiny
  fbqat export runs/tiny --soc sm8750                 compile for the Snapdragon 8 Elite's NPU
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="diffusers|transformers|torch.onnx")
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("\nfbqat: interrupted; nothing half-written is left. Training goes on with --resume.", file=sys.stderr)
        return 130
    except (OSError, SafetensorError, ValueError, ImportError, FloatingPointError, RuntimeError) as error:
        if options.traceback:
            raise
        # safetensors passes the system's number on in its text only
        full = getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error)
        hint = " Free some space, then repeat the command (training: with --resume)." if full else ""
        print(f"fbqat: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1
    return 0


def _demo(options: argparse.Namespace) -> None:
    from fbqat_hub.training.demo import demo

    demo(options.output, steps=options.steps)


def _train(options: argparse.Namespace) -> None:
    from fbqat_hub.training.distill import train
    from fbqat_hub.training.recipe import load_recipe

    recipe = load_recipe(options.recipe, **changes_of(options.set))
    output = train(recipe, options.output, resume=options.resume)
    print(f"saved {output}. Next: fbqat evaluate {output} ; fbqat card {output}")


def _convert(options: argparse.Namespace) -> None:
    from fbqat_hub.training.ptq import convert_pipeline

    settings = {"weight_clip": options.clip, "modules_to_not_convert": options.leave}
    output = convert_pipeline(options.pipeline, options.output, settings)
    print(f"saved {output}. Name your prompts' data set in its recipe.yaml, then measure it: fbqat evaluate {output}")


def _generate(options: argparse.Namespace) -> None:
    from fbqat_hub.training.generate import generate

    prompts = options.prompt + (_lines(options.prompts) if options.prompts else [])
    path = generate(options.model, prompts, options.output, seed=options.seed, call=changes_of(options.set))
    print(f"saved {path}")


def _evaluate(options: argparse.Namespace) -> None:
    from fbqat_hub.training.evaluate import evaluate

    for record in evaluate(options.run_folder):
        spread = "" if record.spread is None else f" ± {record.spread:.3g}"
        print(f"{record.metric:16s} {record.value:.4g}{spread} {record.unit}  (n = {record.n})")
    print(f"saved {options.run_folder / 'results.json'}")


def _card(options: argparse.Namespace) -> None:
    from fbqat_hub.hub.card import write_card

    print(f"saved {write_card(options.run_folder, options.repo)}")


def _export(options: argparse.Namespace) -> None:
    from fbqat_hub.training.device import export_run

    output = options.output or options.run_folder / "htp"
    certificate = export_run(options.run_folder, output, soc=options.soc)
    for name in ("emulator_vs_cpu_qdq", "emulator_vs_torch_packed", "cpu_qdq_vs_torch_packed"):
        print(f"{name.replace('_', ' '):26s} SQNR {certificate['parity'][name]['sqnr_db']:.1f} dB")
    print(f"saved {output}. Ran on: x86 emulator. Never ran on: a phone.")


def _parser() -> argparse.ArgumentParser:
    from fbqat_hub.version import __version__

    parser = argparse.ArgumentParser(
        prog="fbqat",
        description="4-bit diffusion models by fractional-bit quantization-aware training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fbqat_hub {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def verb(name: str, run: Callable[[Any], None], text: str, example: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = verb("demo", _demo, "quantize the tiny Sana that ships, from end to end", "fbqat demo --output runs/demo")
    sub.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to leave (default: runs/demo)")
    sub.add_argument("--steps", type=int, help="training steps of each method (default: the recipe's)")

    sub = verb(
        "train", _train, "train a W4A8 model by a recipe", "fbqat train sana-tiny --output runs/tiny --set steps=800"
    )
    sub.add_argument("recipe", help="YAML file, or the name of a recipe that ships")
    sub.add_argument("--output", type=Path, required=True, help="new folder for the packed pipeline")
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run of the same recipe")
    _settings(sub, "a recipe's field")

    sub = verb(
        "convert", _convert, "quantize a pipeline without training", "fbqat convert my-finetune/ --output mine-w4a8"
    )
    sub.add_argument("pipeline", help="folder or Hub id of a diffusers pipeline")
    sub.add_argument("--output", type=Path, required=True, help="new folder for the packed pipeline")
    sub.add_argument("--clip", choices=("mse", "max_abs"), default="mse", help="how scales are found (default: mse)")
    sub.add_argument(
        "--leave", nargs="*", default=[], metavar="PATTERN", help="modules to leave in float, e.g. 'proj_out'"
    )

    sub = verb("generate", _generate, "draw pictures", 'fbqat generate runs/tiny "red heart" "flag of france" --seed 3')
    sub.add_argument("model", help="folder or Hub id of a pipeline")
    sub.add_argument("prompt", nargs="*", help="what to draw")
    sub.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    sub.add_argument("--output", type=Path, default=Path("generated.png"), help="PNG (default: generated.png)")
    sub.add_argument("--seed", type=int, default=0, help="of the first picture; the next one has the next seed")
    _settings(sub, "an argument of the pipeline call")

    for name, run, text in (
        ("evaluate", _evaluate, "measure a run against its teacher"),
        ("card", _card, "write a run's model card from what was measured"),
        ("export", _export, "compile a run for a Snapdragon's NPU (QNN HTP) and certify it"),
    ):
        sub = verb(name, run, text, f"fbqat {name} runs/tiny")
        sub.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run")
        if name == "card":
            sub.add_argument("--repo", help="Hub id it will be published as, for the code block")
        if name == "export":
            sub.add_argument("--soc", default="sm8750", help="target (default: sm8750, the Snapdragon 8 Elite)")
            sub.add_argument("--output", type=Path, help="new folder (default: RUN/htp)")
    return parser


def _settings(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=f"change {what}")


def changes_of(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs as a mapping; values are read as YAML, and 1e-4 is a number.

    >>> changes_of(["steps=800", "learning_rate=1e-4", "method=vqat"])
    {'steps': 800, 'learning_rate': 0.0001, 'method': 'vqat'}
    """
    import yaml

    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}.")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {key}: {value!r} is not YAML, such as 5, true or '{{preset: paper}}'.") from None
        if isinstance(changes[key], str) and "e" in value:
            with contextlib.suppress(ValueError):
                changes[key] = float(value)
    return changes


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
