"""Command lines that documents and scripts show, taken apart and parsed as the command line would."""

from __future__ import annotations

from dataclasses import dataclass

from trenchcoat import cli
from trenchcoat.cli_blocks import ACTIONS
from trenchcoat.config import Recipe
from trenchcoat.recipe_io import load_recipe

PLANNED = {"shard", "collect", "train", "stitch", "run", "status"}
"""Actions of `trenchcoat blocks` beside `plan`; one that `ACTIONS` lacks is parsed without its own options."""


@dataclass(frozen=True)
class Seen:
    """One command."""

    launcher: str
    """What stands before `trenchcoat`."""
    words: list[str]
    """What stands behind it."""
    recipe: Recipe
    """Of the recipe and the overrides that it names."""


def parse_trenchcoat(words: list[str]) -> Seen:
    """``[launcher ...] trenchcoat command recipe ...``; fails where the command line would refuse it."""
    place = next(i for i, word in enumerate(words) if word == "trenchcoat")
    own = words[place + 1 :]
    accepted = own
    if own[0] == "blocks" and own[1] not in ACTIONS:
        assert own[1] in PLANNED, own
        accepted = ["blocks", "plan", own[2], *(word for word in own[3:] if "=" in word and not word.startswith("-"))]
    args = cli._parse(accepted)
    return Seen(" ".join(words[:place]), own, load_recipe(args.recipe, args.overrides))
