"""Registers `optimum-cli export qnn`. Loaded by every call of optimum-cli: heavy modules are imported in `run`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class QNNExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export qnn --model PIPELINE OUTPUT`."""

    COMMAND = CommandInfo(name="qnn", help="Compile a packed W4A8 diffusion pipeline for a Snapdragon's NPU (QNN HTP).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options of `fbqat export`, which this runs."""
        parser.add_argument("--model", "-m", required=True, help="folder or Hub id of a packed pipeline")
        parser.add_argument("output", type=Path, help="new folder")
        parser.add_argument(
            "--soc", nargs="+", default=[], help="target; of several a bundle each (default: sm8750, the 8 Elite)"
        )
        parser.add_argument(
            "--precision",
            default="w4a8",
            help="w4a8 (default), w4a16, w8a8 or w8a16 (the same 4-bit codes, stored one per byte), or auto",
        )
        parser.add_argument("--a16", nargs="*", default=[], metavar="PATTERN", help="layers at 16 activation bits")
        parser.add_argument("--graphs", default="1", metavar="N", help="split the model into N graphs")
        parser.add_argument(
            "--decoder-tile", metavar="PIXELS", help="side of the tiles that larger pictures are decoded in"
        )
        parser.add_argument("--prompts", help="text file to calibrate on and generate (default: the recipe's data)")
        parser.add_argument("--images", default="2", metavar="N", help="generated on the emulator (default: 2)")

    def run(self) -> None:
        """Export, or exit with status 1 and one line that says what failed and what to do."""
        from fbqat_hub.cli import main

        given = self.args
        command = ["export", given.model, "--output", str(given.output)]
        command += ["--precision", given.precision, "--graphs", given.graphs, "--images", given.images]
        command += ["--soc", *given.soc] if given.soc else []
        command += ["--a16", *given.a16] if given.a16 else []
        command += ["--prompts", given.prompts] if given.prompts else []
        command += ["--decoder-tile", given.decoder_tile] if given.decoder_tile else []
        if status := main(command):
            sys.exit(status)


REGISTER_COMMANDS = [(QNNExportCommand, ExportCommand)]
