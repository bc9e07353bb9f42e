"""`trenchcoat recipes`: the recipes that ship with the package."""

from __future__ import annotations

import argparse
import re
from typing import Any

from trenchcoat.cli.command import Command
from trenchcoat.config.recipe_io import RECIPES, builtin_recipes


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", choices=builtin_recipes(), metavar="NAME", help="show this recipe's file")


def _run(args: argparse.Namespace) -> Any:
    """The recipes that ship with trenchcoat.

    List the recipes that ship with trenchcoat, or show the file of one, to write your own from it:

      trenchcoat recipes smollm2_135m > mine.yaml
    """
    if args.name is not None:
        return ((RECIPES / f"{args.name}.yaml").read_text(encoding="utf-8").rstrip(),)
    from rich.table import Table

    table = Table("recipe", "what it does")
    for name in builtin_recipes():
        table.add_row(name, about(name))
    return table, "trenchcoat recipes NAME shows a file; trenchcoat plan NAME says what it needs"


def about(name: str) -> str:
    """The first sentence of a recipe's opening comment."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return re.split(r"\. |: minutes", comment, maxsplit=1)[0].rstrip(".")


COMMAND = Command(_run, _options, examples=("recipes", "recipes smollm2_135m"), libraries=False)
