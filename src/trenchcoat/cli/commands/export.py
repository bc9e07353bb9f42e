"""`trenchcoat export`: an adapter, a merged model, or the files of the original code."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import Command, output_folder, path


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=path, metavar="DIR", help="a run's folder or an adapter folder")
    parser.add_argument("--out", type=output_folder, metavar="DIR", required=True, help="folder to write")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="a complete model instead of an adapter")
    form.add_argument("--to", choices=["lolcats"], help="the .pt files of the original LoLCATs code")


def _run(args: argparse.Namespace) -> Any:
    """Write the adapter, or a merged model, of a run.

    Write what a run learned to a separate folder: the adapter (feature maps, mixes, LoRA; needs the base model) or,
    with --merge, a complete model that AutoModelForCausalLM loads after `import trenchcoat`.
    """
    from trenchcoat.conversion import stages
    from trenchcoat.models.lolcats import checkpoints

    if args.to is not None:
        return checkpoints.export_checkpoint(args.target, args.out)
    return stages.export(args.target, args.out, merge=args.merge)


COMMAND = Command(
    _run,
    _options,
    examples=("export runs/smollm2_135m --merge --out merged",),
)
