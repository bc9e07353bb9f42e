"""`trenchcoat plan`: what a recipe needs."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import recipe_command
from trenchcoat.cli.machine import add_machine, machine_of, with_json


def _options(parser: argparse.ArgumentParser) -> None:
    add_machine(parser)
    parser.add_argument(
        "--simulate", action="store_true", help="also run a step of the real shapes on fake tensors: minutes, one CPU"
    )


def _run(args: argparse.Namespace) -> Any:
    """What a recipe needs: memory, time and disk, before anything runs.

    Show which ways of running a recipe fit a machine: one GPU, a copy on each, sharded over all (FSDP) or in each node
    (HSDP), shards in host memory, a 4-bit base; with the memory of one GPU part by part, tokens/s and hours at a stated
    MFU, and the disk. It is computed from the model's sizes: no weights, no GPU, and no network for the models of the
    shipped recipes.
    """
    from trenchcoat.planning.report import report_plan

    machine, tokens = machine_of(args)
    return with_json(args, report_plan(args.recipe, machine, tokens=tokens, simulated=args.simulate))


COMMAND = recipe_command(
    _run,
    _options,
    sections=(),
    here=False,
    examples=(
        "plan llama3_1_70b --gpus 8",
        'plan meta-llama/Llama-3.1-8B --gpu "RTX 4090" --gpu-memory 24GB',
    ),
)
