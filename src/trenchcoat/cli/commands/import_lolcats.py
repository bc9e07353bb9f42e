"""`trenchcoat import-lolcats`: an adapter from a checkpoint of the original LoLCATs code."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import Command, output_folder, values
from trenchcoat.config.paths import expanded


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    maps = "feature maps and window factors (and perhaps LoRA): a .pt file, or the hub id of a repository with model.pt"
    add("--maps", type=expanded, required=True, metavar="FILE_OR_ID", help=maps)
    add("--lora", type=expanded, metavar="FILE_OR_ID", help="LoRA of stage 2, where it is in a file of its own")
    add("--base", required=True, metavar="DIR", help="the model it was made from: a folder or a hub id")
    add("--out", type=output_folder, required=True, metavar="DIR", help="adapter folder to write")
    names = "terrace, sliding or linear, or the original's attention_type (terrace where there are window factors)"
    add("--attention", metavar="NAME", help=names)
    add("--window", type=int, metavar="W", help="width of the window in tokens (64)")
    names = "hedgehog, t2r, exp, elu, or the original's feature_map (hedgehog; t2r where the maps have a bias)"
    add("--feature-map", metavar="NAME", help=names)
    skip = "the maps have a skip connection"
    add("--skip-connection", dest="skip", action="store_true", default=None, help=skip)
    add("--affine", action="store_true", default=None, help="affine_attention_factors was true")
    add("--keep-softmax", type=_layers, metavar="N,N", help="layers that kept their softmax attention (none)")
    add("--lora-alpha", type=float, metavar="A", help="alpha of the LoRA (twice the rank)")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected layer numbers like 7,15,23,31") from error


def _run(args: argparse.Namespace) -> Any:
    """Import a LoLCATs checkpoint.

    Convert a checkpoint of the original LoLCATs code into an adapter: its feature maps and window factors (--maps), and
    its LoRA (--lora). The files are read without executing anything in them, and checked against the base model. What
    the keys do not say (the window, the activation) is the original's default unless given here. See docs/LOLCATS.md
    for details.

    Published on the hub: hazyresearch/lolcats-llama-3.1-8b-distill (--maps) with
    hazyresearch/lolcats-llama-3.1-8b-ft-lora (--lora), hazyresearch/lolcats-llama-3.1-70b and
    hazyresearch/lolcats-llama-3.1-405b (--maps alone: both are in one file).
    """
    from trenchcoat.models.lolcats import checkpoints

    names = ("attention", "window", "feature_map", "skip", "affine", "keep_softmax", "lora_alpha")
    asked = checkpoints.Asked(**values(args, *names))
    found = checkpoints.import_checkpoint(args.maps, args.lora, args.base, args.out, asked)
    return *found, f"the adapter is in {args.out}"


COMMAND = Command(
    _run,
    _options,
    examples=("import-lolcats --maps distill.pt --lora finetune.pt --base meta-llama/Llama-3.1-8B --out adapter",),
)
