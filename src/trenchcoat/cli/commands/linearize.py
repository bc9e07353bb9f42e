"""`trenchcoat linearize`: both stages, evaluation, export and report."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import recipe_command


def _run(args: argparse.Namespace) -> Any:
    """Convert a model: selection, both stages, evaluation, report.

    Choose the key/value groups to keep, then attention transfer, LoRA, evaluation, export of the adapter, report.
    Everything goes into the run's folder (run.dir). Run the same command again after a crash or Ctrl-C and it
    continues; finished stages are skipped.
    """
    from trenchcoat.conversion import stages

    return stages.linearize(args.recipe)


COMMAND = recipe_command(
    _run,
    examples=(
        "linearize HuggingFaceTB/SmolLM2-135M-Instruct --out runs/smollm2",
        "linearize llama3_1_8b transfer.lr=5e-3 lora.rank=16",
        "linearize ~/models/mine --data my_texts.jsonl --keep 13%",
    ),
)
