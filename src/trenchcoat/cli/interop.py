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
_SERVE = """\
Serve a linearized model to OpenAI clients (completions and chat, streamed or whole), by Transformers' own server (extra
`serve`). Requests wait for one another; each holds a state of constant size. docs/SERVE.md says what a client can ask.
"""


def add_commands(add: Add, show: Callable[[Any], None]) -> None:
    """Add the commands through `add` of :mod:`trenchcoat.cli.app`; what they leave goes to `show`."""
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
    _add_serve(add("serve", lambda args: _serve(args, show), "serve a linearized model over HTTP", _SERVE))


def _add_serve(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("target", metavar="DIR", help="a run's folder, an adapter folder or a merged folder")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    sub.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    sub.add_argument("--name", default=None, help="name that clients give as `model` (the folder's)")
    sub.add_argument(
        "--context",
        type=int,
        default=None,
        metavar="N",
        help="tokens of a prompt and its answer together (the positions that the base model was made for)",
    )
    sub.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS", help="what running requests get after Ctrl-C (30)"
    )
    sub.add_argument(
        "--chat-template", default=None, metavar="FILE", help="a Jinja chat template, where the tokenizer has none"
    )
    sub.add_argument("--base", default=None, metavar="DIR", help="adapters: where the base model is, if it has moved")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")
    sub.add_argument("--dtype", default="auto", help="of the base weights: auto, float32, bfloat16, float16 (auto)")
    sub.add_argument("--log-level", default="warning", help="debug, info, warning or error (warning)")


def _serve(args: argparse.Namespace, show: Callable[[Any], None]) -> None:
    from trenchcoat.linearize.stages import Outcome
    from trenchcoat.serving.server import ServeSettings, serve

    names = ("host", "port", "name", "context", "grace", "chat_template", "base", "device", "dtype", "log_level")
    settings = ServeSettings(**{name: getattr(args, name) for name in names})
    serve(Path(args.target), settings, lambda line: show(Outcome((line,))))


def _import_lolcats(args: argparse.Namespace) -> Any:
    from trenchcoat.linearize.stages import Outcome
    from trenchcoat.models.lolcats import checkpoints

    asked = checkpoints.Asked(
        attention=args.attention,
        window=args.window,
        feature_map=args.feature_map,
        skip=args.skip_connection,
        affine=args.affine,
        keep_softmax=None if args.keep_softmax is None else _layers(args.keep_softmax),
        lora_alpha=args.lora_alpha,
    )
    lora = None if args.lora is None else Path(args.lora)
    told = checkpoints.import_checkpoint(Path(args.maps), lora, args.base, Path(args.out), asked)
    return Outcome((*told, f"the adapter is in {args.out}"))


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--keep-softmax is {text!r}; expected layer numbers like 7,15,23,31") from error


def export_lolcats(args: argparse.Namespace) -> Any:
    """`export DIR --to lolcats`."""
    from trenchcoat.linearize.stages import Outcome
    from trenchcoat.models.lolcats import checkpoints

    return Outcome(tuple(checkpoints.export_checkpoint(Path(args.target), Path(args.out))))
