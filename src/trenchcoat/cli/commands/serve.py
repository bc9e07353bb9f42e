"""`trenchcoat serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse

from trenchcoat.cli.command import DEVICE_HELP, TARGET_HELP, Command, path, values
from trenchcoat.cli.terminal import show


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", type=path, metavar="DIR", help=TARGET_HELP)
    add(
        "--engine",
        default="auto",
        metavar="NAME",
        help="vllm (many requests at once), embedded (one at a time) or auto: vllm where it is installed and can",
    )
    add(
        "--vllm-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option of vLLM's own server, such as --vllm-option=--tensor-parallel-size=2; repeatable",
    )
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="port to listen on (8000)")
    add("--name", help="name that clients give as `model` (the folder's)")
    length = "tokens of a prompt and its answer together (the base model's maximum)"
    add("--context", type=int, metavar="N", help=length)
    add(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time for running requests to finish after Ctrl-C (30)",
    )
    softmax = "serve the model with its own softmax attention, without LoRA, to compare with (embedded server)"
    add("--softmax", action="store_true", help=softmax)
    add("--chat-template", type=path, metavar="FILE", help="a Jinja chat template, where the tokenizer has none")
    add("--base", metavar="DIR", help="adapters: where the base model is, if it has moved")
    add("--device", default="auto", help=DEVICE_HELP)
    add("--dtype", default="auto", help="of the base weights: auto, float32, bfloat16, float16 (auto)")
    add("--log-level", default="info", help="debug, info (a line a request, without its text), warning or error (info)")
    add("--api-key", metavar="KEY", help="key that clients have to send (the environment's TRENCHCOAT_API_KEY, if set)")
    add("--queue", type=int, default=32, metavar="N", help="requests that may wait; others get a 429 (32)")
    add("--max-body", type=float, default=4.0, metavar="MIB", help="size of a request (4)")
    add("--body-seconds", type=float, default=30.0, metavar="SECONDS", help="time for a request to arrive (30)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name with a dot that clients may use for this server; repeatable (any, unless it listens on loopback)",
    )


def _run(args: argparse.Namespace) -> None:
    """Serve a linearized model over HTTP.

    Serve a linearized model to OpenAI clients (completions and chat, streamed or whole), with a chat page at / (extra
    `serve`). Requests wait for one another; each holds a state that hardly grows. For many users at once, vLLM serves
    merged folders (extra `vllm`, in an environment of its own). docs/SERVE.md lists the supported requests.
    """
    from trenchcoat.serving.server import ServeSettings, serve

    names = (
        "host",
        "port",
        "name",
        "context",
        "grace",
        "chat_template",
        "base",
        "device",
        "dtype",
        "log_level",
        "engine",
        "softmax",
    )
    limits = ("api_key", "queue", "max_body", "body_seconds")
    settings = ServeSettings(
        **values(args, *names, *limits), allow_host=tuple(args.allow_host), vllm_option=tuple(args.vllm_option)
    )
    serve(args.target, settings, lambda line: show((line,)))


COMMAND = Command(
    _run,
    _options,
    examples=("serve runs/smollm2_135m --port 8000",),
)
