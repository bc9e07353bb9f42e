"""`trenchcoat finetune`: stage 2 alone."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import recipe_command


def _run(args: argparse.Namespace) -> Any:
    """Stage 2 alone: LoRA on the transferred model.

    Stage 2: LoRA and feature maps, by the divergence from the teacher or by the next-token loss. It continues from the
    transfer in the run's folder (made by `trenchcoat transfer` with the same recipe); with transfer=null it is the
    baseline without transfer.
    """
    from trenchcoat.conversion import stages

    return stages.finetune(args.recipe)


COMMAND = recipe_command(
    _run,
    sections=("model", "student", "data", "run", "lora"),
    examples=(
        "finetune smollm2_135m lora.lr=1e-4",
        "finetune smollm2_135m transfer=null run.dir=runs/without_transfer",
    ),
)
