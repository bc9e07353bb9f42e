"""What `generate` and `chat` have in common: options of sampling and of the state, and streamed output."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from trenchcoat.cli.command import DEVICE_HELP, path, values

if TYPE_CHECKING:
    from trenchcoat.generation.generate import Sampling


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options for sampling and for the state."""
    add = parser.add_argument
    add("--temperature", type=float, metavar="T", help="sample at this temperature (default: greedy)")
    add("--top-p", type=float, metavar="P", help="sample from the smallest set of tokens with this probability mass")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    more = "any option of Transformers' GenerationConfig, such as repetition_penalty=1.1; may be repeated"
    add("--option", action="append", type=_option, default=[], metavar="NAME=VALUE", help=more)
    add("--seed", type=int, default=0, help="seed of sampling (0)")
    add("--device", default="auto", help=DEVICE_HELP)
    kinds = ["float32", "bfloat16"]
    add("--state-dtype", choices=kinds, default="float32", help="dtype of the state (float32)")
    add("--load-state", type=path, metavar="FILE", help="continue from a saved state")


def _option(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"the value of {text!r} cannot be read ({error})") from error


def sampling_of(args: argparse.Namespace, **options: Any) -> Sampling:
    """The sampling settings of the command line."""
    from trenchcoat.generation.generate import Sampling

    chosen = {name: value for name, value in values(args, "temperature", "top_p", "top_k").items() if value is not None}
    options |= {"do_sample": bool(chosen), **chosen, **values(args, "max_new_tokens", "seed")}
    return Sampling.of(options | dict(args.option))


def loaded_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of the folder."""
    from trenchcoat.models import hub
    from trenchcoat.models.attach import set_state_dtype

    model, tokenizer = hub.load(args.target, device=args.device)
    set_state_dtype(model, args.state_dtype)
    return model, tokenizer


def write(text: str, end: str = "\n") -> None:
    """Write text to standard output and flush."""
    print(text, end=end, flush=True)
