"""What can be typed: the verbs with their options, each with an example."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fbqat_hub.cli import verbs
from fbqat_hub.cli.options import (
    NEW_FOLDER,
    SOURCE,
    Parser,
    checked,
    compiling,
    device,
    fit_option,
    list_option,
    measuring,
    number,
    quantizing,
    seconds,
    settings,
    verb,
)  # fmt: skip
from fbqat_hub.inputs import MAX_SEED, local_path, output_picture
from fbqat_hub.training.gpus import Gpus

_EXAMPLES = """examples:
  fbqat demo                                          a tiny Sana: train, pack, compare, compile, card; all local
  fbqat train sana-tiny --output runs/tiny            quantize by fractional-bit quantization-aware training
  fbqat train my-recipe.yaml --output runs/mine --resume
  fbqat plan my-recipe.yaml --gpus 1x24GB             memory, disk and time, before the run is paid for
  fbqat convert my-finetune/ --output mine-w4a8       quantize without training
  fbqat convert my-finetune/ --output small --text-encoders w8a8      and its text encoders
  fbqat generate runs/tiny "red heart" --output heart.png
  fbqat evaluate runs/tiny && fbqat card runs/tiny
  fbqat compare runs/tiny runs/other --output compared
  fbqat space runs/tiny                               a page: teacher beside W4A8, same prompt and seed
  fbqat export runs/tiny --soc sm8750                 compile for the Snapdragon 8 Elite's NPU
  fbqat doctor runs/tiny/htp --log logcat.txt         what would fail on a phone, and what its errors mean
  fbqat lora train pictures/ --base runs/tiny --output style
  fbqat lora check style/ --base runs/tiny            what an adapter changes, and whether it fits
  fbqat publish runs/tiny --repo me/tiny --dry-run    check everything, show what would go to the Hub
  fbqat pull me/tiny --for diffusers                  download whole, verified by its manifest
  fbqat list --author me                              published, downloaded and local models
"""
_PLANS = """examples:
  fbqat plan sana-600m --gpus 1x24GB                  does it fit, and what does it need
  fbqat plan flux-schnell --gpus 8x80GB --set batch_size=8
  fbqat plan my-recipe.yaml --seconds-per-step 2.5    the hours at your device's pace
  fbqat plan sana-tiny --measure --output runs/plan   bit widths and layers to train, by short runs
"""
_RUN = "folder of a run: what fbqat train or convert left"
_RECIPE = "YAML file, or the name of a recipe that ships, e.g. sana-tiny"


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command; ``run`` of what it returns is the verb's function."""
    from fbqat_hub.version import __version__

    whole = Parser(
        prog="fbqat",
        description="4-bit diffusion models by fractional-bit quantization-aware training.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"fbqat_hub {__version__}")
    whole.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="verb")
    for add in (
        _demo, _train, _plan, _convert, _generate, _evaluate, _compare, _card, _space, _export, _doctor, _lora,
        _publish, _pull, _list,
    ):  # fmt: skip
        add(commands)
    return whole


def _demo(commands: Any) -> None:
    sub = verb(commands, verbs.demo, "quantize the tiny Sana that ships, from end to end", "demo --output runs/demo")
    sub.add_argument(
        "--output", type=NEW_FOLDER, default=Path("runs/demo"), help="folder to leave (default: runs/demo)"
    )
    sub.add_argument("--steps", type=number(1, 10**7), help="training steps of each method (default: the recipe's)")


def _train(commands: Any) -> None:
    sub = verb(
        commands, verbs.train, "train a W4A8 model by a recipe", "train sana-tiny --output runs/tiny --set steps=800"
    )
    sub.add_argument("recipe", type=SOURCE, help=_RECIPE)
    sub.add_argument(
        "--output", type=NEW_FOLDER, required=True, help="new folder for the packed pipeline, its log and recipe"
    )
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run of the same recipe")
    fit_option(sub)
    settings(sub, "fields of the recipe", "steps=800 learning_rate=1e-3 quantization.average_bits=4.5")


def _plan(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.plan,
        "say what a run costs, memory, disk and time, and whether it fits, without its weights; or measure short runs",
        "plan flux-schnell --gpus 8x80GB",
    )
    sub.epilog = _PLANS
    sub.add_argument("recipe", type=SOURCE, help=_RECIPE)
    sub.add_argument(
        "--gpus",
        type=checked(Gpus.parse),
        metavar="NxMGB",
        help="what it is to run on, e.g. 1x24GB or 8x80GB: says whether it fits, and which settings to change",
    )
    sub.add_argument(
        "--seconds-per-step",
        type=checked(seconds),
        metavar="S",
        help="of your device, for the hours; of one block where training is blockwise (default: measured steps)",
    )
    sub.add_argument(
        "--measure",
        action="store_true",
        help="load the teacher and measure what there is to choose from: bit widths, layers to train, time and memory",
    )
    sub.add_argument("--output", type=NEW_FOLDER, help="with --measure: folder for plan.json and curve.png")
    fit_option(sub)
    settings(sub, "fields of the recipe", "method=fbqat-paper")


def _convert(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.convert,
        "quantize a pipeline without training",
        "convert my-finetune/ --output mine-w4a8 --method gptq --prompts prompts.txt",
    )
    sub.add_argument("pipeline", type=SOURCE, help="folder or Hub id of a diffusers pipeline")
    sub.add_argument("--output", type=NEW_FOLDER, required=True, help="new folder for the packed pipeline")
    quantizing(sub)


def _generate(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.generate,
        "generate pictures with a packed or a full-precision pipeline",
        'generate runs/tiny "red heart" "flag of france" --seed 3 --set num_inference_steps=12',
    )
    sub.add_argument("model", type=SOURCE, help="folder or Hub id of a pipeline")
    sub.add_argument("prompt", nargs="*", help="text prompt, in quotes; several give a grid")
    sub.add_argument("--prompts", type=checked(local_path), metavar="FILE", help="text file with a prompt on each line")
    sub.add_argument(
        "--output",
        type=checked(lambda text: output_picture(local_path(text))),
        default=Path("generated.png"),
        help="PNG to write (default: generated.png)",
    )
    sub.add_argument(
        "--seed",
        type=number(0, MAX_SEED),
        default=0,
        help="of the first picture, a whole number (default: 0); the next one has the next seed",
    )
    device(sub)
    settings(sub, "arguments of the pipeline call", "num_inference_steps=20 negative_prompt=blurry")


def _evaluate(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.evaluate,
        "measure a run against its teacher, the full-precision model that it was made from",
        "evaluate runs/tiny --prompts openmoji --images 32 --metrics psnr ssim fd_teacher",
    )
    sub.add_argument("run_folder", metavar="RUN", type=checked(local_path), help=_RUN)
    sub.add_argument(
        "--stage", type=number(3, 8), metavar="BITS", help="measure what the run kept at this width (keep_stages)"
    )
    sub.add_argument(
        "--prompts",
        metavar="NAME",
        help="openmoji, mjhq-30k, pixart-eval-30k, ye-pop, or a text file with a prompt on each line (default: the "
        "recipe's prompts and data)",
    )
    sub.add_argument(
        "--images",
        type=number(1, 100_000),
        metavar="N",
        help="how many pictures of each model (default: the recipe's)",
    )
    measuring(
        sub,
        "kd_loss, bits_per_weight, denoiser_mib, peak_rss_mib (not by default), fd_teacher, fd_real, fid_teacher, "
        "fid_real, clip_fid_teacher, clip_fid_real",
    )


def _compare(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.compare,
        "measure two folders of pictures, matched by file name, against each other",
        "compare runs/tiny runs/other --metrics psnr ssim fd --output compared",
    )
    sub.add_argument(
        "a", metavar="A", type=checked(local_path), help="folder of pictures (PNG, JPEG, WebP) or of an evaluated run"
    )
    sub.add_argument("b", metavar="B", type=checked(local_path), help="the same; the reference")
    sub.add_argument("--output", type=NEW_FOLDER, help="folder for comparison.json and comparison.png")
    measuring(sub, "fd, fid, clip_fid")


def _card(commands: Any) -> None:
    sub = verb(commands, verbs.card, "write a run's model card from what was measured", "card runs/tiny --repo me/tiny")
    sub.add_argument("run_folder", metavar="RUN", type=checked(local_path), help=_RUN)
    sub.add_argument("--repo", help="Hub id it will be published as, for the code block")
    sub.add_argument("--data", type=Path, metavar="FILE", help="YAML file: license, license_link, attribution, notes")


def _space(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.space,
        "serve a page that generates with teacher and quantized model side by side",
        "space runs/tiny --port 7860",
    )
    sub.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        type=SOURCE,
        help="folder or Hub id of a run (default: all in runs/)",
    )
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    sub.add_argument("--port", type=number(1, 65535), default=7860, help="port to listen on (default: 7860)")
    device(sub)


def _export(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.export,
        "compile a run for a Snapdragon's NPU (QNN HTP) and certify it, or write it in another library's format",
        "export runs/tiny --soc sm8750 --precision auto",
    )
    sub.add_argument(
        "--to",
        choices=("htp", "sdnq", "torchao", "comfyui", "encodings"),
        default="htp",
        help="htp: context binaries for a phone; sdnq, torchao: a pipeline that diffusers loads with that package, "
        "without this one; comfyui: a file for ComfyUI (FLUX.1, SD3.5); encodings: a float pipeline and the scales as "
        "AIMET and QNN read them. All but htp take --output only (default: htp)",
    )
    sub.add_argument(
        "run_folder",
        metavar="RUN",
        type=SOURCE,
        help="folder of a run, or of a packed pipeline, or the Hub id of one",
    )
    sub.add_argument("--output", type=NEW_FOLDER, help="new folder (default: RUN/htp, RUN/sdnq; of a Hub id NAME-htp)")
    compiling(sub)


def _doctor(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.doctor,
        "say what will fail before it is compiled, whether a bundle is whole, what a device's error means",
        "doctor runs/tiny --soc sm8750 --log logcat.txt",
    )
    sub.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        type=SOURCE,
        help="folder of a bundle, or a packed pipeline",
    )
    sub.add_argument("--soc", default="sm8750", help="target (default: sm8750, the Snapdragon 8 Elite)")
    sub.add_argument("--log", type=checked(local_path), help="text file of a device's log")


def _lora(commands: Any) -> None:
    whole: argparse.ArgumentParser = commands.add_parser(
        "lora",
        help="adapters (LoRA) on a 4-bit base: train, check, publish one",
        epilog="example:\n  fbqat lora check style/ --base runs/tiny --float training/teachers/sana-tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = whole.add_subparsers(title="commands", required=True, metavar="ACTION", dest="action")
    sub = verb(
        actions,
        verbs.lora_check,
        "say what of an adapter matches a 4-bit base, what it changes, and how near that is to its change in float",
        'check style/ --base runs/tiny --float base/ --prompt "red heart" --output style.json',
    )
    sub.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=SOURCE,
        help="safetensors file, folder or Hub id; of diffusers' or peft's layout",
    )
    sub.add_argument("--base", required=True, type=SOURCE, help="folder or Hub id of a 4-bit pipeline")
    sub.add_argument("--float", dest="float_base", metavar="BASE", type=SOURCE, help="the full-precision pipeline")
    list_option(sub, "--prompt", "TEXT", "generate these without and with the adapter (with --output)")
    sub.add_argument(
        "--output",
        metavar="FILE",
        type=checked(local_path),
        help="JSON file to write; pictures go beside it, as PNG (default: print only)",
    )
    sub.add_argument(
        "--card",
        action="store_true",
        help="write it into the README.md of the adapter's folder too, with the pictures",
    )
    sub.add_argument("--seed", type=number(0, MAX_SEED), default=0, help="of inputs and pictures (default: 0)")
    sub = verb(
        actions,
        verbs.lora_train,
        "train an adapter on captioned pictures; the base stays packed and as it is",
        "train my-pictures/ --base runs/tiny --output style --rank 8 --steps 200",
    )
    sub.add_argument(
        "pictures",
        metavar="FOLDER",
        type=checked(local_path),
        help="pictures, and a metadata.jsonl with file_name and caption of each, or a text file beside each",
    )
    sub.add_argument("--base", required=True, type=SOURCE, help="folder or Hub id of a 4-bit pipeline")
    sub.add_argument("--output", required=True, type=NEW_FOLDER, help="new folder for the adapter and its card")
    sub.add_argument("--rank", type=number(1, 1024), default=8, help="rank of the adapter (default: 8)")
    sub.add_argument("--steps", type=number(1, 10**7), default=200, help="training steps (default: 200)")
    sub.add_argument("--batch-size", type=number(1, 4096), default=4, metavar="N", help="pictures a step (default: 4)")
    sub.add_argument("--learning-rate", type=float, default=1e-3, metavar="RATE", help="of Adam (default: 1e-3)")
    sub.add_argument(
        "--seed",
        type=number(0, MAX_SEED),
        default=0,
        help="seed of weights and draws (default: 0)",
    )
    device(sub)
    sub = verb(
        actions,
        verbs.lora_publish,
        "publish an adapter on the Hub, for a base that is there: checked first, one commit, verified after",
        "publish style/ --repo me/style --base me/Sana-tiny-FBQAT-W4A8 --dry-run",
    )
    sub.add_argument("adapter", metavar="FOLDER", type=checked(local_path), help="of an adapter with its card")
    _publishing(sub)
    sub.add_argument("--base", metavar="REPO", help="Hub id of the 4-bit pipeline (default: the one in the card)")


def _publish(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.publish,
        "publish a run on the Hub: checked first, one commit, verified after",
        "publish runs/tiny --repo me/Sana-tiny-FBQAT-W4A8 --dry-run",
    )
    sub.add_argument("run_folder", metavar="RUN", type=checked(local_path), help="folder of a run with its card")
    _publishing(sub)
    sub.add_argument("--device-repo", action="store_true", help="put htp/ into REPO-QNN-SOC (default: a subfolder)")
    sub.add_argument("--branches", action="store_true", help="a branch for each width of keep_stages: w8, w6, w4")
    sub.add_argument("--collection", metavar="TITLE", help="add it to this collection, by title or slug")


def _publishing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--repo", required=True, help="Hub id, owner/name")
    sub.add_argument("--private", action="store_true", help="make a private repository")
    sub.add_argument("--dry-run", action="store_true", help="do everything but the upload")


def _pull(commands: Any) -> None:
    sub = verb(
        commands,
        verbs.pull,
        "download a published model, complete and verified by its manifest",
        "pull me/Sana-tiny-FBQAT-W4A8 --for diffusers --output sana",
    )
    sub.add_argument("model", type=SOURCE, help="Hub id; with --verify also a folder")
    sub.add_argument("--output", type=NEW_FOLDER, help="folder for the files (default: the Hub's cache)")
    sub.add_argument("--for", dest="use", choices=("diffusers", "htp"), help="only what this needs (default: all)")
    sub.add_argument("--revision", help="branch, tag or commit, as is owner/name@revision (default: main)")
    sub.add_argument("--offline", action="store_true", help="take what is on this machine, and verify it")
    sub.add_argument("--verify", action="store_true", help="download nothing; verify what is on this machine")


def _list(commands: Any) -> None:
    sub = verb(
        commands, verbs.list_models, "list published, downloaded and local models", "list --author me --runs runs"
    )
    sub.add_argument("--author", help="only this user's or organization's on the Hub")
    sub.add_argument("--runs", type=checked(local_path), default=Path("runs"), help="folder of runs (default: runs)")
    sub.add_argument("--local", action="store_true", help="do not ask the Hub")
