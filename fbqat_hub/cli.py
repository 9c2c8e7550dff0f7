"""The ``fbqat`` command: thin, one function a verb. The same verbs are functions of the library."""

from __future__ import annotations

import argparse
import contextlib
import errno
import shlex
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
  fbqat plan my-recipe.yaml --output runs/plan        widths, layers, time and memory, before the run is paid for
  fbqat convert my-finetune/ --output mine-w4a8       quantize without training
  fbqat generate runs/tiny "red heart" --output heart.png
  fbqat evaluate runs/tiny && fbqat card runs/tiny
  fbqat compare runs/tiny runs/other --output compared
  fbqat space runs/tiny                               a page: teacher beside W4A8, same prompt and seed
  fbqat export runs/tiny --soc sm8750                 compile for the Snapdragon 8 Elite's NPU
  fbqat doctor runs/tiny/htp --log logcat.txt         what would fail on a phone, and what its errors mean
  fbqat publish runs/tiny --repo me/tiny --dry-run    check everything, show what would go to the Hub
  fbqat pull me/tiny --for diffusers                  download whole, verified by its manifest
  fbqat list --author me                              published, downloaded and local models
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
        print(*(f"{note}\n" for note in getattr(error, "__notes__", ())), sep="", end="", file=sys.stderr)
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
    named = shlex.quote(str(output))
    print(f"saved {output}. Next: fbqat evaluate {named} ; fbqat card {named}")


def _plan(options: argparse.Namespace) -> None:
    from fbqat_hub.training.plan import plan
    from fbqat_hub.training.recipe import load_recipe

    print(plan(load_recipe(options.recipe, **changes_of(options.set)), options.output).text())
    if options.output:
        print(f"saved {options.output}")


def _convert(options: argparse.Namespace) -> None:
    from fbqat_hub.training.ptq import convert_pipeline

    settings = {"weight_clip": options.clip, "modules_to_not_convert": options.leave}
    output = convert_pipeline(options.pipeline, options.output, settings, options.variant)
    print(
        f"saved {output}. Its recipe.yaml names OpenMoji as data; measure it on prompts of your choice: "
        f"fbqat evaluate {shlex.quote(str(output))} --prompts mjhq-30k --images 1000"
    )


def _generate(options: argparse.Namespace) -> None:
    from fbqat_hub.training.generate import generate

    prompts = options.prompt + (_lines(options.prompts) if options.prompts else [])
    path = generate(options.model, prompts, options.output, seed=options.seed, call=changes_of(options.set))
    print(f"saved {path}")


def _evaluate(options: argparse.Namespace) -> None:
    from fbqat_hub.stages import find_stage
    from fbqat_hub.training.evaluate import evaluate

    records = evaluate(
        options.run_folder,
        stage=options.stage,
        prompts=options.prompts,
        images=options.images,
        metrics=options.metrics,
        device=options.device,
    )
    for record in records:
        unit = "" if record.unit == "1" else f" {record.unit}"
        interval = "" if record.interval is None else "  95% interval {:.4g} to {:.4g}".format(*record.interval)
        name = record.metric + (", teacher" if record.method == "teacher" else "")
        print(f"{name:21s} {record.value:.4g}{unit}{interval}  (n = {record.n})")
    folder = options.run_folder if options.stage is None else find_stage(options.run_folder, options.stage)
    print(f"saved {folder / 'results.json'}")


def _compare(options: argparse.Namespace) -> None:
    from fbqat_hub.evaluation.compare import DEFAULT, compare, table

    rows = compare(options.a, options.b, options.output, options.metrics or DEFAULT, device=options.device or "cpu")
    print(table(rows))
    if options.output:
        print(f"saved {options.output / 'comparison.json'} and {options.output / 'comparison.png'}")


def _card(options: argparse.Namespace) -> None:
    from fbqat_hub.hub.card import write_card

    print(f"saved {write_card(options.run_folder, options.repo)}")


def _space(options: argparse.Namespace) -> None:
    from fbqat_hub.integrations.gradio import app, open_pair
    from fbqat_hub.training.teachers import resolve_teacher

    sources = options.models or sorted(str(path.parent) for path in Path("runs").glob("*/model_index.json"))
    if not sources:
        raise ValueError("no model given, and none in runs/; make one: fbqat train sana-tiny --output runs/sana-tiny")
    page = app([open_pair(source, resolve_teacher) for source in sources])
    page.launch(server_name=options.host, server_port=options.port, share=False)


def _export(options: argparse.Namespace) -> None:
    from fbqat_hub.training.device import export_run

    certificate = export_run(
        options.run_folder,
        options.output or Path(options.run_folder) / "htp",
        soc=options.soc,
        precision=options.precision,
        a16=options.a16,
        graphs=options.graphs,
        prompts=_lines(options.prompts) if options.prompts else (),
        pictures=options.images,
    )
    for name in ("emulator_vs_cpu_qdq", "emulator_vs_torch_packed", "cpu_qdq_vs_torch_packed"):
        print(f"{name.replace('_', ' '):26s} SQNR {certificate['parity'][name]['sqnr_db']:.1f} dB")
    print(f"{'pictures vs torch':26s} PSNR {certificate['pictures']['mean_psnr_db']:.1f} dB")
    print(f"saved {options.output or Path(options.run_folder) / 'htp'}. Ran on: x86 emulator. Never ran on: a phone.")


def _doctor(options: argparse.Namespace) -> None:
    from fbqat_hub.export.bundle import doctor
    from fbqat_hub.export.htp.targets import target_for

    target, findings = target_for(options.soc), []
    if options.model and (Path(options.model) / "manifest.json").is_file():
        findings += doctor.diagnose_bundle(Path(options.model), target)
    elif options.model:
        from fbqat_hub.pipelines import load_pipeline

        findings += doctor.diagnose_model(load_pipeline(options.model).transformer, target)
    if options.log:
        findings += doctor.diagnose_log(options.log.read_text(errors="replace"))
    if not options.model and not options.log:
        raise ValueError("give a bundle or a packed pipeline to look at, or --log FILE of a device.")
    for finding in findings:
        print(f"{finding.level:8s} {finding.what}" + (f"\n         -> {finding.cure}" if finding.cure else ""))
    if errors := sum(finding.level == "error" for finding in findings):
        raise ValueError(f"{errors} {'error' if errors == 1 else 'errors'} found, see above.")


def _publish(options: argparse.Namespace) -> None:
    from fbqat_hub.hub.publish import publish

    publish(
        options.run_folder,
        options.repo,
        private=options.private,
        device_repo=options.device_repo,
        collection=options.collection,
        branches=options.branches,
        dry_run=options.dry_run,
    )


def _pull(options: argparse.Namespace) -> None:
    from fbqat_hub.hub.pull import pull, verify

    if options.verify:
        verify(options.model, use=options.use, revision=options.revision)
    else:
        pull(options.model, options.output, use=options.use, revision=options.revision, offline=options.offline)


def _list(options: argparse.Namespace) -> None:
    from fbqat_hub.hub.listing import downloaded, published, runs, table

    models = [*runs(options.runs), *downloaded()]
    try:
        models = models if options.local else [*published(options.author), *models]
    finally:
        print(table(models))


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
        "plan",
        _plan,
        "measure what a recipe has to choose from: bit widths, layers to train, time and memory",
        "fbqat plan sana-tiny --output runs/plan --set method=fbqat-paper",
    )
    sub.add_argument("recipe", help="YAML file, or the name of a recipe that ships")
    sub.add_argument("--output", type=Path, help="folder for plan.json and curve.png (default: print only)")
    _settings(sub, "a recipe's field")

    sub = verb(
        "convert", _convert, "quantize a pipeline without training", "fbqat convert my-finetune/ --output mine-w4a8"
    )
    sub.add_argument("pipeline", help="folder or Hub id of a diffusers pipeline")
    sub.add_argument("--output", type=Path, required=True, help="new folder for the packed pipeline")
    sub.add_argument("--variant", help="of the weight files, e.g. fp16 for *.fp16.safetensors (default: those without)")
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

    sub = verb(
        "evaluate",
        _evaluate,
        "measure a run against its teacher",
        "fbqat evaluate runs/tiny --prompts openmoji --images 32 --metrics psnr ssim fd_teacher",
    )
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run")
    sub.add_argument("--stage", type=int, metavar="BITS", help="measure what the run kept at this width (keep_stages)")
    sub.add_argument(
        "--prompts",
        metavar="NAME",
        help="prompts to draw: openmoji, mjhq-30k, pixart-eval-30k or ye-pop (default: the recipe's prompts and data)",
    )
    sub.add_argument("--images", type=int, metavar="N", help="how many pictures (default: the recipe's)")
    _measuring(
        sub,
        "kd_loss, bits_per_weight, denoiser_mib, peak_rss_mib (not by default), fd_teacher, fd_real, fid_teacher, "
        "fid_real, clip_fid_teacher, clip_fid_real",
    )

    sub = verb(
        "compare",
        _compare,
        "measure two folders of pictures, matched by file name, against each other",
        "fbqat compare runs/tiny runs/other --metrics psnr ssim fd --output compared",
    )
    sub.add_argument("a", metavar="A", type=Path, help="folder of pictures (PNG, JPEG, WebP) or of an evaluated run")
    sub.add_argument("b", metavar="B", type=Path, help="the same; the reference")
    sub.add_argument("--output", type=Path, help="folder for comparison.json and comparison.png")
    _measuring(sub, "fd, fid, clip_fid")

    sub = verb(
        "publish",
        _publish,
        "publish a run on the Hub: checked first, one commit, verified after",
        "fbqat publish runs/tiny --repo me/Sana-tiny-FBQAT-W4A8 --dry-run",
    )
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run with its card")
    sub.add_argument("--repo", required=True, help="Hub id, owner/name")
    sub.add_argument("--private", action="store_true", help="make a private repository")
    sub.add_argument("--device-repo", action="store_true", help="put htp/ into REPO-QNN-SM8750 (default: a subfolder)")
    sub.add_argument("--branches", action="store_true", help="a branch for each width of keep_stages: w8, w6, w4")
    sub.add_argument("--collection", metavar="TITLE", help="add it to this collection, by title or slug")
    sub.add_argument("--dry-run", action="store_true", help="do everything but the upload")

    sub = verb(
        "pull",
        _pull,
        "download a published model, complete and verified by its manifest",
        "fbqat pull me/Sana-tiny-FBQAT-W4A8 --for diffusers --output sana",
    )
    sub.add_argument("model", help="Hub id; with --verify also a folder")
    sub.add_argument("--output", type=Path, help="folder for the files (default: the Hub's cache)")
    sub.add_argument("--for", dest="use", choices=("diffusers", "htp"), help="only what this needs (default: all)")
    sub.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    sub.add_argument("--offline", action="store_true", help="take what is on this machine, and verify it")
    sub.add_argument("--verify", action="store_true", help="download nothing; verify what is on this machine")

    sub = verb("list", _list, "list published, downloaded and local models", "fbqat list --author me --runs runs")
    sub.add_argument("--author", help="only this user's or organization's on the Hub")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    sub.add_argument("--local", action="store_true", help="do not ask the Hub")

    sub = verb(
        "space",
        _space,
        "serve a page that draws with teacher and quantized model side by side",
        "fbqat space runs/tiny --port 7860",
    )
    sub.add_argument("models", metavar="MODEL", nargs="*", help="folder or Hub id of a run (default: all in runs/)")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    sub.add_argument("--port", type=int, default=7860, help="port (default: 7860)")

    sub = verb("card", _card, "write a run's model card from what was measured", "fbqat card runs/tiny --repo me/tiny")
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run")
    sub.add_argument("--repo", help="Hub id it will be published as, for the code block")

    sub = verb(
        "export",
        _export,
        "compile a run for a Snapdragon's NPU (QNN HTP) and certify it",
        "fbqat export runs/tiny --soc sm8750 --precision auto",
    )
    sub.add_argument("run_folder", metavar="RUN", help="folder of a run, or of a packed pipeline, or the Hub id of one")
    sub.add_argument("--soc", default="sm8750", help="target (default: sm8750, the Snapdragon 8 Elite)")
    sub.add_argument("--output", type=Path, help="new folder (default: RUN/htp)")
    sub.add_argument(
        "--precision",
        default="w4a8",
        choices=("w4a8", "w4a16", "w8a8", "w8a16", "auto"),
        help="weights and activations (default: w4a8; auto: 8 bits where they cost least)",
    )
    sub.add_argument("--a16", nargs="*", default=[], metavar="PATTERN", help="layers at 16 activation bits")
    sub.add_argument("--graphs", type=int, default=1, metavar="N", help="split the model into N graphs (default: 1)")
    sub.add_argument("--prompts", type=Path, help="text file to calibrate on and draw (default: the recipe's data)")
    sub.add_argument("--images", type=int, default=2, metavar="N", help="drawn on the emulator (default: 2)")

    sub = verb(
        "doctor",
        _doctor,
        "say what will fail before it is compiled, whether a bundle is whole, what a device's error means",
        "fbqat doctor runs/tiny --soc sm8750 --log logcat.txt",
    )
    sub.add_argument("model", metavar="MODEL", nargs="?", help="folder of a bundle, or a packed pipeline")
    sub.add_argument("--soc", default="sm8750", help="target (default: sm8750, the Snapdragon 8 Elite)")
    sub.add_argument("--log", type=Path, help="text file of a device's log")
    return parser


def _measuring(parser: argparse.ArgumentParser, own: str) -> None:
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help=f"of psnr, ssim, lpips, {own}, clip_score, clip_iqa, image_reward (default: those without a download)",
    )
    parser.add_argument("--device", help="where networks run, e.g. cuda")


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
