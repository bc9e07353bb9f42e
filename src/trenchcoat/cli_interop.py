"""The grammar of the commands that meet other software: the original LoLCATs code, and servers. No logic lives here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trenchcoat.config import UserError

Add = Callable[..., argparse.ArgumentParser]

_IMPORT = """\
Take over a checkpoint of the original LoLCATs code as an adapter: its feature maps and window factors (--maps), and its
LoRA (--lora). The files are read without executing anything in them, and checked against the base model. What the keys
do not tell (the window, the activation) is the original's default unless said here. docs/LOLCATS.md has the rest.
"""


def add_commands(add: Add, show: Callable[[Any], None]) -> None:
    """Add the commands through `add` of :mod:`trenchcoat.cli`; what they leave goes to `show`."""
    sub = add("import-lolcats", lambda args: show(_import_lolcats(args)), "take over a LoLCATs checkpoint", _IMPORT)
    sub.add_argument("--maps", required=True, metavar="FILE", help="feature maps and window factors, a .pt file")
    sub.add_argument("--lora", default=None, metavar="FILE", help="LoRA of stage 2, a .pt file")
    sub.add_argument("--base", required=True, metavar="DIR", help="the model it was made from: a folder or a hub id")
    sub.add_argument("--out", required=True, metavar="DIR", help="adapter folder to write")
    sub.add_argument(
        "--attention",
        default=None,
        metavar="NAME",
        help="terrace, sliding or linear, or the original's attention_type (terrace where there are window factors)",
    )
    sub.add_argument("--window", type=int, default=None, metavar="W", help="width of the window in tokens (64)")
    sub.add_argument(
        "--feature-map",
        default=None,
        metavar="NAME",
        help="hedgehog, t2r, exp, elu, or the original's feature_map (hedgehog; t2r where the maps have a bias)",
    )
    sub.add_argument("--skip-connection", action="store_true", default=None, help="the maps have a skip connection")
    sub.add_argument("--affine", action="store_true", default=None, help="affine_attention_factors was true")
    sub.add_argument(
        "--keep-softmax", default=None, metavar="N,N", help="layers that kept their softmax attention (none)"
    )
    sub.add_argument("--lora-alpha", type=float, default=None, metavar="A", help="alpha of the LoRA (twice the rank)")


def _import_lolcats(args: argparse.Namespace) -> Any:
    from trenchcoat import lolcats
    from trenchcoat.stages import Outcome

    asked = lolcats.Asked(
        attention=args.attention,
        window=args.window,
        feature_map=args.feature_map,
        skip=args.skip_connection,
        affine=args.affine,
        keep_softmax=None if args.keep_softmax is None else _layers(args.keep_softmax),
        lora_alpha=args.lora_alpha,
    )
    lora = None if args.lora is None else Path(args.lora)
    told = lolcats.import_checkpoint(Path(args.maps), lora, args.base, Path(args.out), asked)
    return Outcome((*told, f"the adapter is in {args.out}"))


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--keep-softmax is {text!r}; expected layer numbers like 7,15,23,31") from error


def export_lolcats(args: argparse.Namespace) -> Any:
    """`export DIR --to lolcats`."""
    from trenchcoat import lolcats
    from trenchcoat.stages import Outcome

    return Outcome(tuple(lolcats.export_checkpoint(Path(args.target), Path(args.out))))
