"""The entry point of ``trenchcoat COMMAND ...``: the table of commands, and the parser made from it."""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from trenchcoat.cli.command import Command
from trenchcoat.cli.terminal import guarded, quiet_libraries, show
from trenchcoat.config import UsageError, UserError
from trenchcoat.config.recipe_io import settings_help

COMMANDS = {
    "demo": "trenchcoat.cli.commands.demo",
    "linearize": "trenchcoat.cli.commands.linearize",
    "select": "trenchcoat.cli.commands.select",
    "transfer": "trenchcoat.cli.commands.transfer",
    "finetune": "trenchcoat.cli.commands.finetune",
    "plan": "trenchcoat.cli.commands.plan",
    "blocks": "trenchcoat.cli.commands.blocks",
    "eval": "trenchcoat.cli.commands.eval",
    "report": "trenchcoat.cli.commands.report",
    "lm-eval": "trenchcoat.cli.commands.lm_eval",
    "generate": "trenchcoat.cli.commands.generate",
    "chat": "trenchcoat.cli.commands.chat",
    "bench": "trenchcoat.cli.commands.bench",
    "export": "trenchcoat.cli.commands.export",
    "import-lolcats": "trenchcoat.cli.commands.import_lolcats",
    "serve": "trenchcoat.cli.commands.serve",
}
"""Every command and the module that defines it, as ``COMMAND``; `--help` lists them in this order."""

DESCRIPTION = """\
Turn a pretrained softmax Transformer into a linear-time, constant-memory model.

  trenchcoat demo                              the whole pipeline on a small embedded model, minutes on a laptop
  trenchcoat linearize llama3_1_8b             the same for Llama 3.1 8B, on one GPU
  trenchcoat generate runs/llama3_1_8b --prompt "A trenchcoat is"

`trenchcoat COMMAND --help` explains a command and every setting it reads.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 stopped)."""
    args = _parse(list(sys.argv[1:] if arguments is None else arguments))
    debug = getattr(args, "debug", False)
    return guarded(lambda: _run(args.command, args, debug), debug=debug)


def _run(command: Command, args: argparse.Namespace, debug: bool) -> None:
    if command.recipe is not None:
        try:
            args.recipe = command.recipe(args)
        except UserError as error:
            raise UsageError(str(error)) from error
    if not debug:
        quiet_libraries()
    show(command.run(args))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, 120), **options)


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with the settings of the recipe's ``sections``, collected when the help is shown."""

    sections: Sequence[str] | None = ()

    def format_help(self) -> str:
        if self.sections is None or self.sections:
            self.epilog = "settings:\n" + settings_help(self.sections)
        return super().format_help()


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse; overrides may come anywhere among the options."""
    commands = {name: importlib.import_module(module).COMMAND for name, module in COMMANDS.items()}
    first: Command | None = commands.get(arguments[0]) if arguments else None
    if first is not None and first.raw:
        return argparse.Namespace(command=first, rest=arguments[1:])
    parser = _parser_of(commands)
    args, rest = parser.parse_known_args(arguments)
    strange = [item for item in rest if item.startswith("-") or "=" not in item or not hasattr(args, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *rest]
    return args


def _parser_of(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    debug = "show the traceback of an error, and the libraries' notices"
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)
    parser = _Parser("trenchcoat", description=DESCRIPTION, formatter_class=_Formatter, parents=[common])

    def add(to: Any, name: str, command: Command) -> None:
        short, more = command.help
        sub = to.add_parser(name, help=short, description=more, formatter_class=_Formatter, parents=[common])
        sub.sections = command.sections
        sub.set_defaults(command=command)
        command.options(sub)
        if command.actions:
            actions = sub.add_subparsers(title="actions", metavar="ACTION", required=True)
            for action, below in command.actions.items():
                add(actions, action, below)

    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.items():
        add(group, name, command)
    return parser
