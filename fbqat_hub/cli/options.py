"""How options are written: errors of one line, checks of single values, options that several commands share."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fbqat_hub.cli.errors import UsageError
from fbqat_hub.inputs import local_path, model_source, output_folder, whole_number

Value = TypeVar("Value")
_DAY = 86_400


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line; what a verb is given may stand after its options too."""

    _verb_read = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers or self._verb_read:  # of a verb argparse's own way calls this method
            return super().parse_known_args(args, namespace)
        self._verb_read = True
        return self.parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:") and "--to" in message.split():
            message += "; a packed model is written in another format by fbqat export --to"
        raise UsageError(f"fbqat: error: {message} (see {self.prog} --help)")


def verb(commands: Any, run: Callable[[Any], None], text: str, example: str) -> argparse.ArgumentParser:
    """A verb, called by the first word of its example."""
    sub: argparse.ArgumentParser = commands.add_parser(
        example.partition(" ")[0],
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.epilog = f"example:\n  {sub.prog.rpartition(' ')[0]} {example}"  # prog: "fbqat lora check"
    sub.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    sub.set_defaults(run=run)
    return sub


def checked(check: Callable[[str], Value]) -> Callable[[str], Value]:
    """A check of one value as argparse takes it: the sentence of its error is shown."""

    @functools.wraps(check)
    def convert(text: str) -> Value:
        try:
            return check(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(" ".join(str(error).split())) from None

    return convert


def number(least: int, most: int) -> Callable[[str], int]:
    """A whole number in these bounds, both allowed."""
    return checked(lambda text: whole_number(text, least, most))


def _folder(text: str) -> Path:
    return output_folder(local_path(text))


# As types of arguments: what a verb reads and what it makes.
SOURCE, NEW_FOLDER = checked(model_source), checked(_folder)


def measuring(sub: argparse.ArgumentParser, own: str) -> None:
    """``--metrics``, of which ``own`` are this verb's alone, and ``--device``."""
    metrics = f"of psnr, ssim, lpips, {own}, clip_score, clip_iqa, image_reward (default: those without a download)"
    list_option(sub, "--metrics", "METRIC", metrics)
    device(sub)


def device(sub: argparse.ArgumentParser) -> None:
    """``--device``."""
    sub.add_argument("--device", help="cpu, cuda, cuda:1, mps or xpu: where networks run (default: a GPU if any)")


def settings(sub: argparse.ArgumentParser, what: str, example: str) -> None:
    """``--set``."""
    list_option(sub, "--set", "KEY=VALUE", f"change {what}, e.g. {example}")


def fit_option(sub: argparse.ArgumentParser) -> None:
    """``--fit``."""
    sub.add_argument(
        "--fit",
        type=checked(_fit),
        metavar="SIZE",
        help="the best widths with which the pipeline's files fit, e.g. 6GB, or the denoiser's: transformer=3GB",
    )


def list_option(sub: argparse.ArgumentParser, name: str, metavar: str, text: str) -> None:
    """An option of several values; given again, it adds to them."""
    sub.add_argument(name, nargs="+", action="extend", default=[], metavar=metavar, help=text)


def _fit(text: str) -> Any:
    from fbqat_hub.training.fit import Fit

    return Fit.parse(text)


def seconds(text: str) -> float:
    """A number above 0, at most a day."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _DAY:
        raise ValueError(f"{text!r:.50} is no number of seconds above 0, at most {_DAY} (a day).")
    return value


def quantizing(sub: argparse.ArgumentParser) -> None:
    """The options of ``fbqat convert`` but what it reads and writes."""
    sub.add_argument(
        "--method",
        choices=("nearest", "gptq"),
        default="nearest",
        help="nearest: each weight to its nearest code; gptq: codes whose errors cancel out on what the sampler asks "
        "of the model for --prompts, one block in memory at a time (default: nearest)",
    )
    sub.add_argument(
        "--prompts",
        type=checked(local_path),
        metavar="FILE",
        help="with --method gptq: text file with a prompt on each line",
    )
    sub.add_argument(
        "--samples",
        type=number(1, 10_000),
        metavar="N",
        help="with --method gptq: inputs of the model to calibrate on, all in memory at each block (default: 100)",
    )
    sub.add_argument(
        "--average-bits",
        type=float,
        metavar="BITS",
        help="8 bits for the layers that matter most, so many bits per weight on average, e.g. 4.5: to the output with "
        "--method gptq, else those whose weights lose most (default: 4)",
    )
    fit_option(sub)
    sub.add_argument(
        "--text-encoders",
        choices=("w8a8", "w8", "w4a8", "w4"),
        help="quantize these too: bits of weights and of activations, float without a8 (default: copied as they are)",
    )
    sub.add_argument("--variant", help="variant of the weight files, e.g. fp16 (default: files without one)")
    sub.add_argument(
        "--clip",
        choices=("mse", "max_abs"),
        default="mse",
        help="how the scale of each output channel is found: least squared error, or the largest weight (default: mse)",
    )
    list_option(sub, "--leave", "PATTERN", "modules to leave in float, e.g. 'proj_out' or '*.attn2.*'")
    sub.add_argument(
        "--lora",
        type=SOURCE,
        metavar="ADAPTER",
        help="merge this adapter first: safetensors file, folder or Hub id; of diffusers' or peft's layout",
    )
    sub.add_argument("--lora-scale", type=float, metavar="SCALE", help="factor on the adapter's change (default: 1)")
    sub.add_argument(
        "--device", help="with --method gptq: cpu, cuda, cuda:1, mps or xpu, for one block (default: a GPU if any)"
    )
    settings(
        sub,
        "arguments of the pipeline call (its recipe keeps them, gptq samples with them)",
        "height=512 guidance_scale=3.5",
    )


def compiling(sub: argparse.ArgumentParser) -> None:
    """The options of ``fbqat export`` for a Snapdragon but what it reads and writes."""
    list_option(sub, "--soc", "SOC", "target; of several a bundle each, OUTPUT/SOC (default: sm8750, 8 Elite)")
    sub.add_argument(
        "--precision",
        default="w4a8",
        choices=("w4a8", "w4a16", "w8a8", "w8a16", "auto"),
        help="weights and activations (default: w4a8; w8a8 and w8a16: the same 4-bit codes, stored one per byte; auto: "
        "8 bits where they cost least)",
    )
    sub.add_argument(
        "--target-db",
        type=float,
        metavar="DB",
        help="with --precision auto: the output's SQNR to torch that 8 bits must leave (default: 25)",
    )
    list_option(sub, "--a16", "PATTERN", "layers at 16 activation bits, e.g. '*.attn2.*'")
    sub.add_argument(
        "--graphs", type=number(1, 1000), default=1, metavar="N", help="split the model into N graphs (default: 1)"
    )
    sub.add_argument(
        "--prompts",
        type=checked(local_path),
        metavar="FILE",
        help="text file with a prompt on each line, to calibrate on and to generate (default: the recipe's data)",
    )
    sub.add_argument(
        "--images",
        type=number(1, 1000),
        default=2,
        metavar="N",
        help="how many pictures to generate with the emulator (default: 2)",
    )
    sub.add_argument(
        "--tune",
        type=number(0, 10**6),
        default=0,
        metavar="STEPS",
        help="train scales, ranges and biases as the NPU computes with them, towards the run's teacher, before "
        "compiling, e.g. 100 (default: 0, as they are)",
    )
    sub.add_argument(
        "--decoder-tile",
        type=number(1, 100_000),
        metavar="PIXELS",
        help="decode larger pictures in tiles of this side (default: at most 128, for 8 GB of memory)",
    )
    sub.add_argument(
        "--samples",
        type=number(1, 10**6),
        default=100,
        metavar="N",
        help="inputs of the denoiser to calibrate on, at most (default: 100)",
    )
    sub.add_argument(
        "--quick",
        action="store_true",
        help="for models of true size, of which the emulator takes minutes a forward: compare one forward, look for "
        "wrong ops in the first block of the denoiser only, emulate the first of several graphs of a text encoder or "
        "decoder only, and generate no picture on the emulator",
    )
    of_htp = (
        "soc", "precision", "target_db", "a16", "graphs", "prompts", "images", "tune", "decoder_tile", "samples",
        "quick",
    )  # fmt: skip
    sub.set_defaults(of_htp={name: sub.get_default(name) for name in of_htp})
