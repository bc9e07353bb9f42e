"""`trenchcoat chat`: talk with a linearized model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trenchcoat.cli.command import TARGET_HELP, Command, output_file, path
from trenchcoat.cli.sampling import add_sampling, loaded_model, sampling_of, write
from trenchcoat.config import UserError
from trenchcoat.config.paths import expanded

_COMMANDS = "/reset, /save FILE, /load FILE, /quit"


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", type=path, metavar="DIR", help=TARGET_HELP)
    add("--max-new-tokens", type=int, default=512, metavar="N", help="maximum tokens per answer (512)")
    add_sampling(parser)
    add("--save-state", type=output_file, metavar="FILE", help="write the state when the chat ends")
    add("--compare", action="store_true", help="also stream the softmax teacher's answer, side by side")


def _run(args: argparse.Namespace) -> None:
    """Talk with a linearized model.

    Talk with a linearized model, in its chat template or, where the tokenizer has none, in a plain transcript. Ctrl-C
    stops an answer. In the chat: /reset clears the history, /save FILE and /load FILE write and read the state, /quit
    ends.
    """
    from trenchcoat.generation.conversation import Conversation
    from trenchcoat.generation.generate import softmax_twin

    if args.compare and args.load_state is not None:
        raise UserError(
            "the softmax model cannot continue from a linearized model's state: leave out --compare or --load-state"
        )
    sampling, (model, tokenizer) = sampling_of(args), loaded_model(args)
    talks = {"linear": Conversation(model, tokenizer, sampling)}
    if args.load_state is not None:
        talks["linear"].load(args.load_state)
    if args.compare:
        talks["softmax"] = Conversation(softmax_twin(model), tokenizer, sampling)
    style = "in its chat template" if talks["linear"].templated else "as a plain transcript (it has no chat template)"
    write(f"{args.target}, {style}; {_COMMANDS}; Ctrl-C stops an answer")
    if args.compare:
        write(_pays_from(args.target))
    while (line := _ask()) is not None:
        if line.startswith("/"):
            if not _command(line, talks):
                break
        elif line.strip():
            _answer(line, talks)
    if args.save_state is not None:
        talks["linear"].save(args.save_state)


def _pays_from(target: Path) -> str:
    """From which length on the linearized model is the faster one, if the run's report measured it."""
    from trenchcoat.evaluation.results import Results

    measured = target / "results.json"
    results = Results.load(measured) if measured.is_file() else None
    if results is None or not results.decode:
        return "(from which length on the linearized model is the faster one was not measured here)"
    crossing, longest = results.crossing(), max(point.context for point in results.decode["student"])
    if crossing is None:
        return f"(the linearized model was not faster up to {longest:,} tokens, the longest measured)"
    return f"(measured: the linearized model writes faster from about {crossing:,} tokens of text on)"


def _ask() -> str | None:
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        write("")
        return None
    except UnicodeDecodeError as error:
        write(f"(that is not UTF-8 text: {error})")
        return ""


def _command(line: str, talks: dict[str, Any]) -> bool:
    """Carry out a command; False ends the chat. A mistake is shown, and the chat continues."""
    word, _, rest = line.partition(" ")
    try:
        rest = expanded(rest.strip())
        if word == "/quit":
            return False
        if word == "/reset":
            for talk in talks.values():
                talk.reset()
            write("(history cleared)")
        elif word == "/save" and rest:
            talks["linear"].save(rest)
            write(f"(saved to {rest}: {Path(rest).stat().st_size / 2**20:.2f} MiB)")
        elif word == "/load" and rest and len(talks) == 1:
            talks["linear"].load(rest)
            write(f"(loaded {rest}: {talks['linear'].session.seen} tokens seen)")
        elif word == "/load" and rest:
            write("(the softmax model cannot read a linearized model's state)")
        else:
            write(f"(not understood: {line}; commands: {_COMMANDS})")
    except (UserError, OSError) as error:
        write(f"({error})")
    return True


def _answer(line: str, talks: dict[str, Any]) -> None:
    """Stream one answer, or two in columns, the second after the first so that neither slows the other."""
    from trenchcoat.runtime.interrupts import stop_on_signals

    with stop_on_signals() as stop:
        if len(talks) == 1:
            reply = talks["linear"].ask(line, lambda text: write(text, end=""), lambda: stop.requested)
            write(f"\n({reply.summary})")
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
    from rich.table import Column, Table
    from rich.text import Text

    texts = dict.fromkeys(names, "")
    console = Console()

    def table() -> Table:
        made = Table(*(Column(name, ratio=1) for name in names), expand=True)
        made.add_row(*(Text(texts[name].strip()) for name in names))
        return made

    if not console.is_terminal:
        yield lambda name, text: texts.update({name: texts[name] + text})
        for name in names:
            write(f"{name}: {texts[name].strip()}")
        return
    with Live(table(), console=console, vertical_overflow="visible") as live:

        def add(name: str, text: str) -> None:
            texts[name] += text
            live.update(table(), refresh=True)

        yield add


COMMAND = Command(
    _run,
    _options,
    examples=(
        "chat runs/smollm2_135m",
        "chat runs/smollm2_135m --compare",
    ),
)
