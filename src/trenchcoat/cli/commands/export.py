"""`trenchcoat export`: an adapter, a complete model (also to the hub, or of a class that other programs know), or the
files of the original code."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import Command, output_folder, path
from trenchcoat.config import UsageError

DTYPES = ("stored", "float32", "bfloat16", "float16")


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", type=path, metavar="DIR", help="a run's folder, or an adapter or complete folder")
    add("--out", type=output_folder, metavar="DIR", help="folder to write")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--merge", action="store_true", help="a complete model instead of an adapter")
    native = "a model of a class that Transformers and vLLM ship; needs student.name=gated_delta_layer and a kept layer"
    form.add_argument("--native", action="store_true", help=native)
    form.add_argument("--to", choices=["lolcats"], help="the .pt files of the original LoLCATs code")
    hub = "upload the complete model to the hub under this name, such as you/model (log in first: hf auth login)"
    add("--push-to-hub", metavar="NAME", help=hub)
    add("--private", action="store_true", help="make it private there, where it does not exist yet")
    dtype = f"dtype of the complete model's weights: {', '.join(DTYPES)} (stored: that of the base model's files)"
    add("--dtype", choices=DTYPES, metavar="DTYPE", help=dtype)


def _run(args: argparse.Namespace) -> Any:
    """Write the adapter, or a merged model, of a run.

    Write what a run learned to a separate folder: the adapter (feature maps, mixes, LoRA; needs the base model) or,
    with --merge, a complete model with a model card, that AutoModelForCausalLM loads after `import trenchcoat`, or with
    trust_remote_code=True where the package is installed. With --native, a complete model of a class that Transformers
    and vLLM ship, which needs neither. --push-to-hub uploads the complete model.
    """
    from trenchcoat.conversion import stages
    from trenchcoat.models.lolcats import checkpoints

    complete = args.merge or args.native or args.push_to_hub is not None
    if args.out is None and args.push_to_hub is None:
        raise UsageError("give --out DIR, the folder to write, or --push-to-hub NAME")
    if args.to is not None and args.push_to_hub is not None:
        raise UsageError("--push-to-hub uploads a complete model: leave out --to")
    if args.dtype is not None and not complete:
        raise UsageError(
            "--dtype is that of a complete model: give --merge or --native too (what was learned stays in float32)"
        )
    if args.private and args.push_to_hub is None:
        raise UsageError("--private goes with --push-to-hub NAME")
    dtype = args.dtype or "stored"
    if args.to is not None:
        return checkpoints.export_checkpoint(args.target, args.out)
    if args.push_to_hub is not None:
        hub = {"native": args.native, "private": args.private}
        return stages.publish(args.target, args.push_to_hub, args.out, dtype=dtype, **hub)
    if args.native:
        return stages.export_native(args.target, args.out, dtype=dtype)
    return stages.export(args.target, args.out, merge=args.merge, dtype=dtype)


COMMAND = Command(
    _run,
    _options,
    examples=("export runs/smollm2_135m --merge --out merged", "export runs/layers --native --out for-vllm"),
)
