"""A new command: one file (here, this one) and one line in the table of commands."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from trenchcoat.cli import app
from trenchcoat.cli.command import Command, recipe_command
from trenchcoat.config import UserError

# The file: the command's arguments and its function.


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=int, default=1, metavar="N", help="how often the window fits (1)")


def _run(args: argparse.Namespace) -> Any:
    """The longest context in a recipe's window.

    Say how many tokens N windows of the recipe's student hold.
    """
    if args.times < 1:
        raise UserError(f"--times must be at least 1, got {args.times}")
    return (f"{args.times * args.recipe.student.window} tokens",)


COMMAND: Command = recipe_command(_run, _options, sections=("student",))


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the command."""
    monkeypatch.setitem(app.COMMANDS, "reach", __name__)


def _help(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        app.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_it_is_listed_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "reach         The longest context in a recipe's window\n" in _help(capsys=capsys)
    text = _help("reach", capsys=capsys)
    for part in (
        "trenchcoat reach [-h] [--debug]",
        "MODEL_OR_RECIPE",
        "Say how many tokens",
        "--times N",
        "student.window=64",
    ):
        assert part in text
    assert "transfer.lr=0.01" not in text


def test_it_runs_and_has_the_usual_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app.main(["reach", "demo", "--times", "3", "student.window=10"]) == 0
    assert capsys.readouterr().out == "30 tokens\n"

    assert app.main(["reach", "demo", "--times", "0"]) == 1
    assert capsys.readouterr().err == "trenchcoat: --times must be at least 1, got 0\n"

    assert app.main(["reach", "demo", "student.windw=3"]) == 2
    assert "did you mean student.window?" in capsys.readouterr().err
    assert app.main(["reach", "demo", "--times", "many"]) == 2
    assert "argument --times: invalid int value" in capsys.readouterr().err

    def interrupted(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{__name__}.COMMAND", recipe_command(interrupted))
    assert app.main(["reach", "demo"]) == 130
