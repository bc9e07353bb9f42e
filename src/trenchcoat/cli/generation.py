"""The grammar and the terminal of `trenchcoat generate` and `trenchcoat chat`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trenchcoat.config import UserError

GENERATE = """\
Continue one or more prompts with a linearized model: a run's folder, an adapter folder or a merged folder. The state
held while writing has a constant size, and so has the file that --save-state writes: a long beginning is read once
(--max-new-tokens 0) and gone on from with --load-state.
"""
CHAT = """\
Talk with a linearized model, in its chat template or, where the tokenizer has none, in a plain transcript. Ctrl-C stops
an answer. In the chat: /reset forgets everything, /save FILE and /load FILE keep and take up the state, /quit ends.
"""
_COMMANDS = "/reset, /save FILE, /load FILE, /quit"


def add_generate(sub: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    sub.add_argument("target", metavar="DIR", help="a run's folder, an adapter folder or a merged folder")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text to continue, `-` for standard input; may be repeated")
    source.add_argument(
        "--prompts", metavar="FILE", help='prompts, one a line, or {"prompt": ...} a line of a .jsonl; `-`: stdin'
    )
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to write (64)")
    sub.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (8)")
    sub.add_argument("--beams", type=int, default=1, metavar="N", help="beam search with N beams (1)")
    _add_common(sub)
    sub.add_argument("--jsonl", action="store_true", help="a JSON object a line: prompt, text, tokens, seconds")
    sub.add_argument("--out", metavar="FILE", help="write the JSON lines to FILE")
    sub.add_argument("--save-state", metavar="FILE", help="write the state after the prompt and its continuation")
    sub.add_argument("--compare", action="store_true", help="show the softmax teacher's continuation beside it")


def add_chat(sub: argparse.ArgumentParser) -> None:
    """The options of `chat`."""
    sub.add_argument("target", metavar="DIR", help="a run's folder, an adapter folder or a merged folder")
    sub.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens of an answer at most (512)")
    _add_common(sub)
    sub.add_argument("--save-state", metavar="FILE", help="write the state when the chat ends")
    sub.add_argument("--compare", action="store_true", help="stream the softmax teacher's answer beside it")


def _add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--temperature", type=float, default=None, metavar="T", help="sample at this temperature (default: greedy)"
    )
    sub.add_argument("--top-p", type=float, default=None, metavar="P", help="sample from the smallest set of this mass")
    sub.add_argument("--top-k", type=int, default=None, metavar="K", help="sample from the K likeliest tokens")
    sub.add_argument(
        "--option",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="any option of Transformers' GenerationConfig, such as repetition_penalty=1.1; may be repeated",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of sampling (0)")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")
    sub.add_argument(
        "--state-dtype", choices=["float32", "bfloat16"], default="float32", help="what the state is kept in (float32)"
    )
    sub.add_argument("--load-state", metavar="FILE", help="go on from a saved state")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"the value of {text!r} cannot be read ({error})") from error


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Options for `generate_text` and `generation_config`."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    named = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    chosen = {name: value for name, value in named.items() if value is not None}
    options |= {"do_sample": bool(chosen), **chosen, **dict(args.option)}
    if options["do_sample"]:
        options.setdefault("top_k", 0)
    return options


# generate


def generate(args: argparse.Namespace) -> None:
    """`trenchcoat generate`."""
    from trenchcoat.linearize import stages
    from trenchcoat.runtime.files import atomic_file

    options = {"num_beams": args.beams, **_sampling(args)}
    rows = stages.generate_rows(
        Path(args.target),
        _prompts(args),
        device=args.device,
        compare=args.compare,
        state_dtype=args.state_dtype,
        start=None if args.load_state is None else Path(args.load_state),
        end=None if args.save_state is None else Path(args.save_state),
        batch_size=args.batch_size,
        seed=args.seed,
        **options,
    )
    if args.out is not None:
        with atomic_file(Path(args.out)) as partial, open(partial, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    for row in rows:
        _say(json.dumps(row, ensure_ascii=False) if args.jsonl else _readable(row))


def _readable(row: dict[str, Any]) -> str:
    if "softmax" in row:
        return f"{row['prompt']}\n  linear: {row['text']}\n  softmax: {row['softmax']}"
    return f"{row['prompt']}{row['text']}"


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    where = "standard input" if args.prompts == "-" else args.prompts
    try:
        text = sys.stdin.read() if args.prompts == "-" else Path(args.prompts).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error})") from error
    lines = text.splitlines()
    if args.prompts.endswith(".jsonl"):
        lines = [_json_prompt(line, f"{where}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"{where} holds no prompts; expected one a line")
    return lines


def _json_prompt(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); expected an object with a text under `prompt`") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f'{where} has no text under `prompt`; expected {{"prompt": "..."}}')
    return str(found["prompt"])


# chat


def chat(args: argparse.Namespace) -> None:
    """`trenchcoat chat`."""
    from trenchcoat.generation.conversation import Conversation, softmax_twin
    from trenchcoat.models import hub
    from trenchcoat.models.attach import set_state_dtype

    if args.compare and args.load_state is not None:
        raise UserError("the softmax model cannot go on from a linearized model's state; leave out one of the two")
    model, tokenizer = hub.load(Path(args.target), device=args.device)
    set_state_dtype(model, args.state_dtype)
    talks = {"linear": Conversation(model, tokenizer, _sampling(args), args.seed)}
    if args.load_state is not None:
        talks["linear"].load(args.load_state)
    if args.compare:
        talks["softmax"] = Conversation(softmax_twin(model), tokenizer, _sampling(args), args.seed)
    style = "in its chat template" if talks["linear"].templated else "as a plain transcript (it has no chat template)"
    _say(f"{args.target}, {style}; {_COMMANDS}; Ctrl-C stops an answer")
    while (line := _ask()) is not None:
        if line.startswith("/"):
            if not _command(line, talks):
                break
        elif line.strip():
            _answer(line, talks)
    if args.save_state is not None:
        talks["linear"].save(args.save_state)


def _ask() -> str | None:
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        _say("")
        return None


def _command(line: str, talks: dict[str, Any]) -> bool:
    """Obey; False ends the chat. Mistakes are told, and the chat goes on."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    try:
        if word == "/quit":
            return False
        if word == "/reset":
            for talk in talks.values():
                talk.reset()
            _say("(everything is forgotten)")
        elif word == "/save" and rest:
            talks["linear"].save(rest)
            _say(f"(saved to {rest}: {Path(rest).stat().st_size / 2**20:.2f} MiB)")
        elif word == "/load" and rest and len(talks) == 1:
            talks["linear"].load(rest)
            _say(f"(loaded {rest}: {talks['linear'].session.seen} tokens seen)")
        elif word == "/load" and rest:
            _say("(the softmax model cannot take up a linearized model's state)")
        else:
            _say(f"(not understood: {line}; commands: {_COMMANDS})")
    except (UserError, OSError) as error:
        _say(f"({error})")
    return True


def _answer(line: str, talks: dict[str, Any]) -> None:
    """Stream one answer, or two in columns, the second after the first so that neither slows the other."""
    from trenchcoat.runtime.interrupts import stop_on_signals

    with stop_on_signals() as stop:
        if len(talks) == 1:
            reply = talks["linear"].ask(line, lambda text: _say(text, end=""), lambda: stop.requested)
            _say(f"\n({reply.summary})")
            return
        with _columns(list(talks)) as show:
            for name, talk in talks.items():
                reply = talk.ask(line, lambda text, name=name: show(name, text), lambda: stop.requested)
                show(name, f"\n({reply.summary})")


@contextmanager
def _columns(names: list[str]) -> Iterator[Callable[[str, str], None]]:
    """Yield a function that adds text to a column; without a terminal the texts come one below the other."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = dict.fromkeys(names, "")
    console = Console()

    def table() -> Table:
        made = Table(expand=True)
        for name in names:
            made.add_column(name, ratio=1)
        made.add_row(*(Text(texts[name].strip()) for name in names))
        return made

    if not console.is_terminal:
        yield lambda name, text: texts.update({name: texts[name] + text})
        for name in names:
            _say(f"{name}: {texts[name].strip()}")
        return
    with Live(table(), console=console, vertical_overflow="visible") as live:

        def add(name: str, text: str) -> None:
            texts[name] += text
            live.update(table(), refresh=True)

        yield add
