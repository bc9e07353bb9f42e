"""Command lines that documents and scripts show, taken apart and parsed as the command line would."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from trenchcoat.cli import app as cli
from trenchcoat.cli.blocks import ACTIONS
from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import load_recipe


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
    accepted = own if own[:2] != ["blocks", "run"] else _without_unknown(own)
    args = cli._parse(accepted)
    return Seen(" ".join(words[:place]), own, load_recipe(args.recipe, args.overrides))


def _without_unknown(words: list[str]) -> list[str]:
    """Of `blocks run`, without `--parallel` and `--launcher NAME` as long as the action does not take them."""
    known = argparse.ArgumentParser()
    ACTIONS["run"].options(known)
    if "--parallel" in known.format_help() or "--parallel" not in words:
        return words
    launcher = words.index("--launcher") if "--launcher" in words else len(words)
    assert words[launcher + 1 : launcher + 2] in ([], ["local"], ["slurm"])
    return [word for i, word in enumerate(words) if word != "--parallel" and i not in (launcher, launcher + 1)]
