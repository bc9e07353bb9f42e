"""The entry point of ``trenchcoat COMMAND ...``: the table of commands, and the parser made from it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

from trenchcoat.cli.command import Command
from trenchcoat.cli.hints import command_hint, option_hint
from trenchcoat.cli.terminal import guarded, quiet_libraries, show
from trenchcoat.config import UsageError, UserError
from trenchcoat.config.package import installed_version
from trenchcoat.config.recipe_io import settings_help, settings_summary

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
    "recipes": "trenchcoat.cli.commands.recipes",
    "families": "trenchcoat.cli.commands.families",
    "completion": "trenchcoat.cli.commands.completion",
}
"""Every command and the module that defines it, as ``COMMAND``; `--help` lists them in this order."""

_OWN_OPTIONS = ("--help", "--version", "-h")
"""The options, beside `--debug`, that may stand in place of a command."""

DESCRIPTION = """\
Turn a pretrained softmax Transformer into a linear-time, constant-memory model.

  trenchcoat demo                              the whole pipeline on a small embedded model, minutes on a laptop
  trenchcoat linearize MODEL --out runs/mine   the same for a model of yours: a hub id, a folder or a .gguf file
  trenchcoat plan MODEL                        before that: what it needs, and how long it takes
  trenchcoat generate runs/mine --prompt "A trenchcoat is"

`trenchcoat COMMAND --help` explains a command and every setting it reads.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 stopped)."""
    if "_ARGCOMPLETE" in os.environ:
        _complete(os.environ.get("COMP_LINE", "").split()[1:2])
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    return guarded(lambda: _run(_parse(words or ["--help"]), debug), debug=debug)


def _complete(named: Sequence[str]) -> None:
    """Tell the shell what may follow, and exit."""
    import argcomplete

    argcomplete.autocomplete(parser_of(load_commands(named if set(named) <= COMMANDS.keys() and named else COMMANDS)))


def _run(args: argparse.Namespace, debug: bool) -> None:
    command: Command = args.command
    if command.recipe is not None:
        try:
            args.recipe = command.recipe(args)
        except UserError as error:
            raise UsageError(str(error)) from error
    if command.libraries and not debug:
        quiet_libraries()
    show(command.run(args))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=28, width=_columns(), **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs filled to the terminal's width; one with an indented line stays as it is."""
        return "\n\n".join(
            part if re.search(r"^ ", part, re.MULTILINE) else textwrap.fill(" ".join(part.split()), width)
            for part in text.split("\n\n")
        )


def _columns() -> int:
    """The terminal's width, of which a help page uses at most 120."""
    return min(shutil.get_terminal_size().columns, 120)


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, and whose help ends with its command's examples and settings.

    The settings are those of the recipe's ``sections``, collected when the help is shown.
    """

    sections: Sequence[str] | None = ()
    examples: Sequence[str] = ()

    def format_help(self) -> str:
        parts = [self.epilog or ""]
        if self.examples:
            parts.append("examples:\n" + "\n".join(f"  trenchcoat {line}" for line in self.examples))
        if self.sections is None or self.sections:
            parts.append(settings_summary(self.sections))
            parts.append("settings, section by section:\n" + settings_help(self.sections, min(_columns(), 100)))
        own, self.epilog = self.epilog, "\n\n".join(part for part in parts if part)
        try:
            return super().format_help()
        finally:
            self.epilog = own

    def error(self, message: str) -> NoReturn:
        """Raise the message as wrong usage."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), map(str, action.choices or ()), n=1, cutoff=0.5)
            if not near:
                raise
            raise argparse.ArgumentError(action, f"invalid choice {value!r}, the nearest is {near[0]!r}") from error


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse; overrides may come anywhere among the options. Only the module of the named command is imported.

    Raises ``UsageError``.
    """
    name = next((word for word in arguments if word != "--debug"), "")
    if not name.startswith("-") and name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; {command_hint(name, COMMANDS)}")
    if name.startswith("-") and name not in _OWN_OPTIONS:
        near = difflib.get_close_matches(name, _OWN_OPTIONS, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "options come behind the command; see trenchcoat --help"
        raise UsageError(f"trenchcoat has no option {name.partition('=')[0]}; {hint}")
    commands = load_commands([name] if name in COMMANDS else COMMANDS)
    if name in commands and commands[name].raw:
        return argparse.Namespace(command=commands[name], rest=arguments[arguments.index(name) + 1 :])
    args, rest = parser_of(commands).parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if strange:
        raise UsageError(_unrecognized(args, arguments, strange))
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *rest]
    return args


def _unrecognized(args: argparse.Namespace, arguments: list[str], strange: list[str]) -> str:
    """The message about words that no option takes; the first that looks like an option is explained."""
    parser: _Parser = args.parser
    flag = next((word for word in strange if word.startswith("-")), None)
    if flag is None:
        what = "settings" if all("=" in word for word in strange) else "further arguments"
        return f"{parser.prog} takes no {what}: {' '.join(strange)}; see {parser.prog} --help"
    words = arguments[arguments.index(flag) :]
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    sections: Sequence[str] | None = (args.command.sections or None) if hasattr(args, "overrides") else ()
    hint = option_hint(words, options, sections) or f"see {parser.prog} --help"
    return f"{parser.prog} has no option {flag.partition('=')[0]}; {hint}"


def load_commands(names: Iterable[str]) -> dict[str, Command]:
    """The commands of these names; imports their modules, which are light."""
    return {name: importlib.import_module(COMMANDS[name]).COMMAND for name in names}


class _Version(argparse.Action):
    """Prints the version, and those of the libraries that matter most, which are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
        own = installed_version() or "(not installed)"
        print(f"trenchcoat {own} (Python {platform.python_version()}, {libraries})")
        parser.exit()


def parser_of(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of ``trenchcoat`` with these commands."""
    common = argparse.ArgumentParser(add_help=False)
    debug = "show the traceback of an error, and the libraries' notices"
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)
    parser = _Parser("trenchcoat", description=DESCRIPTION, formatter_class=_Formatter, parents=[common])
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, and those of its libraries")

    def add(to: Any, name: str, command: Command) -> None:
        short, more = command.help
        sub = to.add_parser(name, help=short, description=more, formatter_class=_Formatter, parents=[common])
        sub.sections, sub.examples = command.sections, command.examples
        sub.set_defaults(command=command, parser=sub)
        command.options(sub)
        if command.actions:
            actions = sub.add_subparsers(title="actions", metavar="ACTION", required=True)
            for action, below in command.actions.items():
                add(actions, action, below)

    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.items():
        add(group, name, command)
    return parser
