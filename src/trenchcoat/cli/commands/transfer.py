"""`trenchcoat transfer`: stage 1 alone."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import recipe_command


def _run(args: argparse.Namespace) -> Any:
    """Stage 1 alone: attention transfer.

    Stage 1: train each layer's feature maps so that the linear attention reproduces the softmax attention's outputs.
    The model itself is frozen, and no gradient passes through it.
    """
    from trenchcoat.conversion import stages

    return stages.transfer(args.recipe)


COMMAND = recipe_command(
    _run,
    sections=("model", "student", "data", "run", "transfer"),
    examples=("transfer smollm2_135m transfer.lr=5e-3",),
)
