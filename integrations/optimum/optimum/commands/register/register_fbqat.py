"""Registers `optimum-cli quantize` and `optimum-cli export qnn`.

Every call of optimum-cli loads this and makes both parsers: heavy modules are imported in `run`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class QuantizeCommand(BaseOptimumCLICommand):
    """`optimum-cli quantize --model PIPELINE OUTPUT`: `fbqat convert`."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a diffusion pipeline to 4-bit weights and 8-bit activations.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options of `fbqat convert`."""
        from fbqat_hub.cli.options import NEW_FOLDER, SOURCE, quantizing

        parser.add_argument("--model", "-m", type=SOURCE, required=True, help="folder or Hub id of a float pipeline")
        parser.add_argument("output", type=NEW_FOLDER, help="new folder for the packed pipeline")
        quantizing(parser)

    def run(self) -> None:
        """Quantize, or exit with status 1 and one line that says what failed and what to do."""
        _run("convert", self.args, pipeline=self.args.model)


class QNNExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export qnn --model PIPELINE OUTPUT`: `fbqat export`."""

    COMMAND = CommandInfo(name="qnn", help="Compile a packed W4A8 diffusion pipeline for a Snapdragon's NPU (QNN HTP).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options of `fbqat export`."""
        from fbqat_hub.cli.options import NEW_FOLDER, SOURCE, compiling

        parser.add_argument("--model", "-m", type=SOURCE, required=True, help="folder or Hub id of a packed pipeline")
        parser.add_argument("output", type=NEW_FOLDER, help="new folder")
        compiling(parser)

    def run(self) -> None:
        """Export, or exit as `QuantizeCommand` does."""
        _run("export", self.args, run_folder=self.args.model, to="htp", of_htp={})


def _run(verb: str, options: object, **more: object) -> None:
    from fbqat_hub.cli import run, verbs

    vars(options).update(more, verb=verb, run=getattr(verbs, verb), traceback=False)
    if status := run(options):  # type: ignore[arg-type]
        sys.exit(status)


REGISTER_COMMANDS = [QuantizeCommand, (QNNExportCommand, ExportCommand)]
