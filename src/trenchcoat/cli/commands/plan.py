"""`trenchcoat plan`: what a recipe needs."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import recipe_command
from trenchcoat.cli.machine import add_machine, machine_of, with_json


def _options(parser: argparse.ArgumentParser) -> None:
    add_machine(parser)
    parser.add_argument("--details", action="store_true", help="memory by part, tokens/s, blocks, disk and notes too")
    parser.add_argument(
        "--simulate", action="store_true", help="also run a step of the real shapes on fake tensors: minutes, one CPU"
    )


def _run(args: argparse.Namespace) -> Any:
    """What a recipe needs: memory, time and disk, before anything runs.

    Say whether a machine can run a recipe, by which command and in how many hours, and show which ways of running it
    fit: one GPU, a copy on each, sharded over all (FSDP) or in each node (HSDP), shards in host memory, a 4-bit base.
    --details adds the memory of one GPU part by part, tokens/s at a stated MFU, the ways block by block, and the disk.
    It is computed from the model's sizes: no weights, no GPU, and no network for the models of the shipped recipes.
    """
    from trenchcoat.planning.report import report_plan

    machine, tokens = machine_of(args)
    options = {"tokens": tokens, "simulated": args.simulate, "details": args.details}
    return with_json(args, report_plan(args.recipe, machine, named=args.named, **options))


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
