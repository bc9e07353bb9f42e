"""`trenchcoat generate`: continue prompts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trenchcoat.cli.command import TARGET_HELP, Command, output_file, path, values
from trenchcoat.cli.sampling import add_sampling, loaded_model, sampling_of, write
from trenchcoat.config import UserError
from trenchcoat.config.paths import expanded


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", type=path, metavar="DIR", help=TARGET_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text to continue, `-` for standard input; may be repeated")
    lines = 'prompts, one per line, or {"prompt": ...} per line of a .jsonl; `-`: stdin'
    source.add_argument("--prompts", metavar="FILE", help=lines)
    add("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to write (64)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at once (8)")
    add("--beams", type=int, default=1, metavar="N", help="beam search with N beams (1)")
    add_sampling(parser)
    add("--jsonl", action="store_true", help="one JSON object per line: prompt, text, tokens, seconds")
    add("--out", type=output_file, metavar="FILE", help="write the JSON lines to FILE")
    add("--save-state", type=output_file, metavar="FILE", help="write the state after the prompt and its continuation")
    add("--compare", action="store_true", help="also show the softmax teacher's continuation")


def _run(args: argparse.Namespace) -> None:
    """Write text with a linearized model.

    Continue one or more prompts with a linearized model: a run's folder, an adapter folder or a merged folder. The
    state, but for the keys and values of kept groups, has a constant size, and so has the file that --save-state
    writes: a long prefix is processed once (--max-new-tokens 0) and continued with --load-state.
    """
    from trenchcoat.generation.generate import generate_rows
    from trenchcoat.runtime.files import atomic_file

    sampling, prompts = sampling_of(args, num_beams=args.beams), _prompts(args)
    model, tokenizer = loaded_model(args)
    options = {"start": args.load_state, "end": args.save_state, **values(args, "compare", "batch_size")}
    rows = generate_rows(model, tokenizer, prompts, sampling, **options)
    if args.out is not None:
        with atomic_file(args.out) as partial, open(partial, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    for row in rows:
        write(json.dumps(row, ensure_ascii=False) if args.jsonl else _readable(row))


def _readable(row: dict[str, Any]) -> str:
    if "softmax" in row:
        return f"{row['prompt']}\n  linear: {row['text']}\n  softmax: {row['softmax']}"
    return f"{row['prompt']}{row['text']}"


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [_standard_input() if prompt == "-" else prompt for prompt in args.prompt]
    where = "standard input" if args.prompts == "-" else args.prompts
    try:
        text = _standard_input() if args.prompts == "-" else Path(expanded(args.prompts)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error})") from error
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    lines = text.splitlines()
    if args.prompts.endswith(".jsonl"):
        lines = [_json_prompt(line, f"{where}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"{where} holds no prompts; expected one per line")
    return lines


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error})") from error


def _json_prompt(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); expected an object with a text under `prompt`") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f'{where} has no text under `prompt`; expected {{"prompt": "..."}}')
    return str(found["prompt"])


COMMAND = Command(
    _run,
    _options,
    examples=(
        'generate runs/smollm2_135m --prompt "A trenchcoat is" --max-new-tokens 100',
        "generate merged --prompts questions.txt --out answers.jsonl",
    ),
)
