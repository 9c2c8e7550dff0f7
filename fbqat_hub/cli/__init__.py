"""The ``fbqat`` command: thin, one function a verb (`verbs`). The same verbs are functions of the library."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from fbqat_hub.cli.errors import FAULT, UsageError, line_of
from fbqat_hub.cli.parser import parser
from fbqat_hub.progress import only_ours

__all__ = ["main", "run"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or 2 for a command that cannot be read, 1 for any other error, 130 after Ctrl-C.

    Raises:
        SystemExit: with status 0, after --help and --version.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no arrows still gets the numbers
    try:
        options = parser().parse_args(arguments)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Run a verb that was parsed: the exit status of `main`."""
    warnings.filterwarnings("ignore", module="diffusers|transformers|torch.onnx|torch.distributed.fsdp")
    try:
        with only_ours():
            options.run(options)
    except KeyboardInterrupt:
        print("\nfbqat: interrupted; nothing half-written is left. Training goes on with --resume.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # what reads the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.traceback:
            raise
        line = line_of(error, options.verb)
        if line is None:
            traceback.print_exc()
            line = FAULT
        print(f"fbqat: error: {line}", file=sys.stderr)
        print(*(f"{note}\n" for note in getattr(error, "__notes__", ())), sep="", end="", file=sys.stderr)
        return 1
    return 0
