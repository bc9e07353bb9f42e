"""Command lines that documents and scripts show, taken apart and parsed as the command line would."""

from __future__ import annotations

from dataclasses import dataclass

from trenchcoat.cli import app as cli
from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import load_recipe


@dataclass(frozen=True)
class Seen:
    """One command."""

    launcher: str
    """What comes before `trenchcoat`."""
    words: list[str]
    """What follows it."""
    recipe: Recipe
    """Of the recipe and the overrides that it names."""


def parse_trenchcoat(words: list[str]) -> Seen:
    """``[launcher ...] trenchcoat command recipe ...``; fails where the command line would refuse it."""
    place = next(i for i, word in enumerate(words) if word == "trenchcoat")
    own = words[place + 1 :]
    args = cli._parse(own)
    return Seen(" ".join(words[:place]), own, load_recipe(args.recipe, args.overrides))
