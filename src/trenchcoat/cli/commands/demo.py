"""`trenchcoat demo`: the whole pipeline on the embedded model."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import Command, add_overrides
from trenchcoat.config.recipe_io import load_recipe


def _run(args: argparse.Namespace) -> Any:
    """The whole pipeline on the embedded model, minutes on two CPU cores.

    Linearize the small Llama that ships with trenchcoat, on text from the Python standard library: check the machine,
    attention transfer, LoRA, evaluation, texts of both models side by side, the report. Nothing is downloaded. After a
    kill or Ctrl-C, the same command resumes. Any setting can be overridden, as in the second example.
    """
    from trenchcoat.conversion import stages

    return stages.demo(args.recipe)


COMMAND = Command(
    _run,
    add_overrides,
    recipe=lambda args: load_recipe("demo", args.overrides),
    sections=None,
    examples=(
        "demo",
        "demo student.window=16 run.dir=runs/window_16",
    ),
)
