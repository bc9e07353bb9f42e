"""From a row to tokens: which schema it has, its template, and which of its tokens count in the labels.

A sample is a list of segments ``(text, counted)``; the segments are joined, tokenized together, and a token counts
when it ends inside a counted segment. Prompts are the Alpaca project's two templates (https://github.com/tatsu-lab/
stanford_alpaca), with a line break after "### Response:" as LoLCATs (arXiv 2410.10254) trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.packing import Encoded

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ROLES = {"human": "user", "gpt": "assistant"}

Segment = tuple[str, bool]


class BadSample(UserError):
    """A row that cannot be trained on; ``reason`` is what it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def segments(row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
    """The segments of one row, by ``cfg.format``; ``auto`` looks for alpaca, then text, then chat columns.

    A row of the Long-LLM schema is "text", or "conversations" where that is absent or null; one with neither is a bad
    row. Raises ``BadSample`` when columns are missing, of the wrong type or empty, and ``UserError`` for chat rows when
    the tokenizer has no chat template.
    """
    columns = {name for name, value in row.items() if value is not None}
    if cfg.format == "alpaca" or (cfg.format == "auto" and {"instruction", "output"} <= columns):
        return _alpaca(row, cfg.mask_prompt)
    if cfg.format == "text" or (cfg.format == "auto" and cfg.text_column in columns):
        return [(_string(row, cfg.text_column), True)]
    if cfg.format == "chat" or columns & {"messages", "conversations"}:
        return _chat(_turns(row), tokenizer, cfg.mask_prompt)
    raise BadSample(
        "missing column",
        f"found the columns {_listed(row)}; expected instruction and output (and input), or {cfg.text_column}, or "
        "messages, or conversations: set data.text_column, or rename the columns",
    )


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "(none)"


def _string(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    """A column's text; an ``optional`` one may be blank, and is when it is absent or null."""
    value = row.get(column)
    if value is None:
        if optional:
            return ""
        raise BadSample("missing column", f"expected a column {column!r}; found the columns {_listed(row)}")
    if not isinstance(value, str):
        raise BadSample("not text", f"column {column!r} holds {type(value).__name__}; expected a string")
    if not optional and not value.strip():
        raise BadSample(f"empty {column}", f"column {column!r} is empty")
    return value


def _alpaca(row: Mapping[str, Any], mask_prompt: bool) -> list[Segment]:
    fields = {"instruction": _string(row, "instruction"), "input": _string(row, "input", optional=True)}
    prompt = (PROMPT_WITH_INPUT if fields["input"] else PROMPT_WITHOUT_INPUT).format_map(fields)
    return [(prompt, not mask_prompt), (_string(row, "output"), True)]


def _turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation as ``{role, content}`` turns; also reads ``{from, value}``, and drops what an assistant says
    before the first user's turn. Of ``conversations`` in ``{role, content}`` (Long-LLM), the first turn is skipped
    when it is not the user's, a system prompt too."""
    found = row["messages"] if row.get("messages") is not None else row.get("conversations")
    if not isinstance(found, list) or not all(isinstance(turn, Mapping) for turn in found):
        raise BadSample(
            "missing column", f"expected a list of turns in messages or conversations; found the columns {_listed(row)}"
        )
    if row.get("messages") is None and found and found[0].get("role") not in (None, "user", "human"):
        found = found[1:]
    turns: list[dict[str, str]] = []
    for turn in found:
        role = _string(turn, "role" if turn.get("role") is not None else "from")
        role = _ROLES.get(role, role)
        if role == "assistant" and not any(earlier["role"] == "user" for earlier in turns):
            continue
        column = "content" if turn.get("content") is not None else "value"
        turns.append({"role": role, "content": _string(turn, column, optional=role != "assistant")})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadSample("no assistant turn", "the conversation has no assistant turn after a user's")
    return turns


def _chat(turns: list[dict[str, str]], tokenizer: Any, mask_prompt: bool) -> list[Segment]:
    """Segments of a rendered conversation: an assistant's text and the marks that close its turn count.

    Needs no ``{% generation %}`` in the template: the conversation is also rendered up to each assistant's turn and
    with it, and the turn's own text is looked for where the renderings part.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the rows are conversations, but the tokenizer has no chat template: take the model's instruct version, "
            "set tokenizer.chat_template and save it with the model, or use text or alpaca rows"
        )

    def render(count: int, **options: bool) -> str:
        return str(tokenizer.apply_chat_template(turns[:count], tokenize=False, **options))

    try:
        full = render(len(turns))
        if not mask_prompt:
            return [(full, True)]
        found: list[Segment] = []
        done = 0
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            text = turn["content"].strip()
            before, until = render(i, add_generation_prompt=True), render(i + 1)
            start = full.find(text, max(done, _shared(before, full)))
            last = until.find(text, _shared(before, until))
            if start < 0 or last < 0:
                raise BadSample("chat template", f"the chat template does not reproduce the text of turn {i + 1}")
            end = start + len(text)
            end += _shared(until[last + len(text) :], full[end:])
            found += [(full[done:start], False), (full[start:end], True)]
            done = end
    except TemplateError as error:
        raise BadSample("chat template", f"the chat template refuses the conversation: {error}") from error
    return [*found, (full[done:], False)]


def _shared(a: str, b: str) -> int:
    """Length of the common beginning."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def encode(tokenizer: Any, samples: Sequence[list[Segment]], *, eos: bool) -> list[Encoded]:
    """Tokens of each sample, in one call of the tokenizer: BOS first and EOS last, where the tokenizer has them.

    A mark that the text already brings (chat templates do) is not added twice; an added one counts as the token
    beside it does. An empty sample stays empty.
    """
    if not samples:
        return []
    if getattr(tokenizer, "is_fast", False):
        texts = ["".join(text for text, _ in sample) for sample in samples]
        batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces = [_fast_piece(sample, batch.encodings[i]) for i, sample in enumerate(samples)]
    else:
        pieces = [_slow_piece(tokenizer, sample) for sample in samples]
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id if eos else None
    return [_with_marks(ids, counted, bos, end) for ids, counted in pieces]


def _fast_piece(sample: list[Segment], encoding: Any) -> Encoded:
    ids = np.array(encoding.ids, dtype=np.int32)
    if all(counts for _, counts in sample):
        return ids, np.ones(len(ids), dtype=np.bool_)
    segment_ends = np.cumsum([len(text) for text, _ in sample])
    token_ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
    counts = np.array([counts for _, counts in sample], dtype=np.bool_)
    return ids, counts[np.minimum(np.searchsorted(segment_ends, token_ends), len(sample) - 1)]


def _slow_piece(tokenizer: Any, sample: list[Segment]) -> Encoded:
    """Without offsets: every segment tokenized by itself."""
    parts = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text, _ in sample]
    ids = np.array([token for part in parts for token in part], dtype=np.int32)
    return ids, np.repeat([counts for _, counts in sample], [len(part) for part in parts]).astype(np.bool_)


def _with_marks(ids: NDArray[np.int32], counted: NDArray[np.bool_], bos: int | None, eos: int | None) -> Encoded:
    if len(ids) == 0:
        return ids, counted
    first = [bos] if bos is not None and bos not in ids[:1] else []
    last = [eos] if eos is not None and eos not in ids[-2:] else []  # chat templates close with EOS and a line break
    marked = np.concatenate([first, ids, last]).astype(np.int32)
    return marked, np.concatenate([counted[:1][: len(first)], counted, counted[-1:][: len(last)]])
