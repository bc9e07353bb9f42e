"""Parses the command lines shown in documents and scripts with the CLI's own parser."""

from __future__ import annotations

from dataclasses import dataclass

from trenchcoat.cli import app as cli
from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import load_recipe


@dataclass(frozen=True)
class Seen:
    """One command."""

    launcher: str
    """The words before `trenchcoat`."""
    words: list[str]
    """The words after it."""
    recipe: Recipe
    """Settings from the recipe and overrides it names."""


def parse_trenchcoat(words: list[str]) -> Seen:
    """``[launcher ...] trenchcoat command recipe ...``; fails if the CLI would reject it."""
    place = next(i for i, word in enumerate(words) if word == "trenchcoat")
    own = words[place + 1 :]
    args = cli._parse(own)
    return Seen(" ".join(words[:place]), own, load_recipe(args.recipe, args.overrides))
