"""Registers `optimum-cli export qnn`. Loaded by every call of optimum-cli: heavy modules are imported in `run`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class QNNExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export qnn --model PIPELINE OUTPUT`."""

    COMMAND = CommandInfo(name="qnn", help="Compile a packed W4A8 diffusion pipeline for a Snapdragon's NPU (QNN HTP).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options; those of `fbqat export`."""
        parser.add_argument("--model", "-m", required=True, help="folder or Hub id of a packed pipeline")
        parser.add_argument("output", type=Path, help="new folder")
        parser.add_argument("--soc", default="sm8750", help="target (default: sm8750, the Snapdragon 8 Elite)")
        parser.add_argument("--precision", default="w4a8", help="w4a8 (default), w4a16, w8a8, w8a16 or auto")
        parser.add_argument("--a16", nargs="*", default=[], metavar="PATTERN", help="layers at 16 activation bits")
        parser.add_argument("--graphs", type=int, default=1, metavar="N", help="split the model into N graphs")
        parser.add_argument("--prompts", type=Path, help="text file to calibrate on and draw (default: the recipe's)")
        parser.add_argument("--images", type=int, default=2, metavar="N", help="drawn on the emulator (default: 2)")

    def run(self) -> None:
        """Export."""
        from fbqat_hub.integrations.optimum import export_qnn

        options = vars(self.args)
        export_qnn(
            **{
                name: options[name]
                for name in ("model", "output", "soc", "precision", "a16", "graphs", "prompts", "images")
            }
        )


REGISTER_COMMANDS = [(QNNExportCommand, ExportCommand)]
