"""`trenchcoat select`: which key/value groups are worth keeping."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from trenchcoat.cli.command import recipe_command
from trenchcoat.config import UserError
from trenchcoat.config.keep import read_keep


def _options(parser: argparse.ArgumentParser) -> None:
    amount = parser.add_mutually_exclusive_group()
    keep = "a share of the cache (13%%) or a number of groups (12) to keep; default: the recipe's student.keep"
    amount.add_argument("--keep", metavar="AMOUNT", type=_amount, help=keep)
    reach = "keep the fewest groups that close this share of the loss past 2W and on copies (95%%)"
    amount.add_argument("--reach", metavar="SHARE", type=_share, help=reach)


def _amount(text: str) -> tuple[str, ...]:
    value = text.strip()
    try:
        keep = read_keep(int(value) if value.isdigit() else value, "--keep")
    except UserError:
        keep = ()
    if not keep:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a share such as 13% or a number of groups such as 12")
    return keep


def _share(text: str) -> float:
    number = text.strip().removesuffix("%").strip()
    try:
        share = float(number) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a share above 0 and up to 100 %, such as 95%")
    return share


def _run(args: argparse.Namespace) -> Any:
    """Measure which key/value groups are worth keeping.

    Score every key/value group (one key/value head with its query heads) of the model by what far text is worth to it,
    choose the best, and score what each share of the cache closes without training. Writes selection.json,
    selection.png and frontier.png into the run's folder. `linearize`, `transfer` and `finetune` do this first, by
    themselves, where student.keep is a share or a number of groups.
    """
    from trenchcoat.conversion import stages

    recipe = args.recipe
    if args.keep is not None:
        recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, keep=args.keep))
    return stages.select(recipe, args.reach)


COMMAND = recipe_command(
    _run,
    _options,
    sections=("model", "student", "data", "select", "run"),
    shortcuts=("--data", "--out"),
    examples=(
        "select smollm2_135m --keep 13%",
        "select smollm2_135m --reach 95%",
    ),
)
