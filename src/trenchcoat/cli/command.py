"""The ``Command`` class, and arguments shared by several commands."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import builtin_recipes, load_recipe

TARGET_HELP = "a run's folder, an adapter folder or a merged folder"
DEVICE_HELP = "auto, cpu, cuda, cuda:1 (auto)"


def nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


@dataclass(frozen=True)
class Command:
    """One command, or one action of a command. Heavy dependencies are imported only when ``run`` is called."""

    run: Callable[[argparse.Namespace], Any]
    """The action. Its docstring is the help: the first line is shown in the list of commands, the rest by ``--help``.
    Its return value is printed: a sequence of texts and Rich renderables, an object with one as ``shown``, or None.
    """
    options: Callable[[argparse.ArgumentParser], None] = nothing
    """Adds its arguments."""
    recipe: Callable[[argparse.Namespace], Recipe] | None = None
    """Reads the recipe, which is passed to ``run`` as ``args.recipe``; a mistake in it is wrong usage."""
    sections: Sequence[str] | None = ()
    """Sections of the recipe whose settings the help lists; None for all."""
    actions: Mapping[str, Command] = field(default_factory=dict)
    """The subcommands, one of which is required: ``trenchcoat blocks ACTION``."""
    raw: bool = False
    """Whether everything after the command's name is passed to ``run`` unparsed, as ``args.rest``."""

    @property
    def help(self) -> tuple[str, str]:
        """(the line in the list of commands, the text of ``--help``)."""
        first, _, more = inspect.cleandoc(self.run.__doc__ or "").partition("\n\n")
        return " ".join(first.split()).rstrip("."), more or first


def recipe_command(
    run: Callable[[argparse.Namespace], Any],
    options: Callable[[argparse.ArgumentParser], None] = nothing,
    sections: Sequence[str] | None = None,
) -> Command:
    """A command that takes a recipe and overrides before its own ``options``."""

    def all_options(parser: argparse.ArgumentParser) -> None:
        known = f"a YAML file, a run's folder, or a built-in recipe: {', '.join(builtin_recipes())}"
        parser.add_argument("recipe", metavar="RECIPE", help=known)
        add_overrides(parser)
        options(parser)

    return Command(run, all_options, lambda args: load_recipe(args.recipe, args.overrides), sections)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Settings as ``KEY=VALUE``, which may also come between the options."""
    text = "settings that override the recipe's, by path: transfer.lr=5e-3 student.name=linear transfer=null"
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=text)


def values(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the arguments, by name."""
    return {name: getattr(args, name) for name in names}


def whole_number(least: int) -> Callable[[str], int]:
    """A type for ``add_argument``: a whole number of at least ``least``."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least {least}")
        return int(text)

    return read
