"""The formats of rows: which columns each has, its template, and which part of the text counts in the labels.

A format is one class and its line in ``FORMATS``. Alpaca prompts are the Alpaca project's two templates
(https://github.com/tatsu-lab/stanford_alpaca), with a line break after "### Response:" as LoLCATs (arXiv 2410.10254)
trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jinja2 import TemplateError

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.samples import BadSample, Rendered, Segment

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


class RowFormat(Protocol):
    """How a format reads a row, a mapping of columns."""

    def columns(self, cfg: DataConfig) -> str:
        """The columns that a row of this format has, for messages."""

    def matches(self, found: set[str], cfg: DataConfig) -> bool:
        """Whether a row with values in the columns ``found`` is of this format, under ``data.format=auto``."""

    def segments(self, row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
        """The text of a row in segments, each with whether it counts in the labels; ``BadSample`` for a row that cannot
        be used."""


class AlpacaFormat:
    """{instruction, input, output}; the input may be absent."""

    def columns(self, cfg: DataConfig) -> str:
        """The required columns, and the optional one."""
        return "instruction and output (and input)"

    def matches(self, found: set[str], cfg: DataConfig) -> bool:
        """Whether it has an instruction and an output."""
        return {"instruction", "output"} <= found

    def segments(self, row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
        """The prompt, and the output."""
        fields = {"instruction": column_text(row, "instruction"), "input": column_text(row, "input", optional=True)}
        prompt = (PROMPT_WITH_INPUT if fields["input"] else PROMPT_WITHOUT_INPUT).format_map(fields)
        return [(prompt, not cfg.mask_prompt), (column_text(row, "output"), True)]


class TextFormat:
    """{text}, or another column named by ``data.text_column``; all of it counts."""

    def columns(self, cfg: DataConfig) -> str:
        """The one column."""
        return cfg.text_column

    def matches(self, found: set[str], cfg: DataConfig) -> bool:
        """Whether it has that column."""
        return cfg.text_column in found

    def segments(self, row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
        """The column's text."""
        return [(column_text(row, cfg.text_column), True)]


class ChatFormat:
    """{messages} or {conversations}: turns, rendered by the tokenizer's chat template."""

    def columns(self, cfg: DataConfig) -> str:
        """Either column."""
        return "messages, or conversations"

    def matches(self, found: set[str], cfg: DataConfig) -> bool:
        """Whether it has one of them."""
        return bool(found & {"messages", "conversations"})

    def segments(self, row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
        """The rendered conversation; ``UserError`` when the tokenizer has no chat template."""
        return _chat(_turns(row), tokenizer, cfg.mask_prompt)


FORMATS: dict[str, RowFormat] = {"alpaca": AlpacaFormat(), "text": TextFormat(), "chat": ChatFormat()}
"""Value of ``data.format`` -> format; ``auto`` takes the first that matches a row. Add yours here."""


def check_format(name: str) -> None:
    """Raise ``UserError`` for a ``data.format`` that is not registered."""
    if name not in ("auto", *FORMATS):
        raise UserError(f"data.format={name!r} is not known; expected auto, {', '.join(FORMATS)}")


def segments(row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
    """The segments of one row, by ``cfg.format``; ``auto`` looks at the columns that have a value.

    A row of the Long-LLM schema is "text", or "conversations" where that is absent or null; one with neither is a bad
    row. Raises ``BadSample`` when columns are missing, of the wrong type or empty, and ``UserError`` for chat rows when
    the tokenizer has no chat template.
    """
    if cfg.format != "auto":
        return FORMATS[cfg.format].segments(row, cfg, tokenizer)
    found = {name for name, value in row.items() if value is not None}
    for each in FORMATS.values():
        if each.matches(found, cfg):
            return each.segments(row, cfg, tokenizer)
    raise BadSample(
        "missing column",
        f"found the columns {_listed(row)}; expected {', or '.join(each.columns(cfg) for each in FORMATS.values())}: "
        "set data.text_column, or rename the columns",
    )


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "(none)"


def column_text(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    """A column's text; an ``optional`` one may be blank, absent or null."""
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


def _turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The conversation as ``{role, content}`` turns; also reads ``{from, value}``, and drops assistant turns before the
    first user turn. In ``conversations`` with ``{role, content}`` (Long-LLM), the first turn is skipped if it is not
    the user's, even a system prompt."""
    found = row["messages"] if row.get("messages") is not None else row.get("conversations")
    if not isinstance(found, list) or not all(isinstance(turn, Mapping) for turn in found):
        raise BadSample(
            "missing column", f"expected a list of turns in messages or conversations; found the columns {_listed(row)}"
        )
    if row.get("messages") is None and found and found[0].get("role") not in (None, "user", "human"):
        found = found[1:]
    turns: list[dict[str, str]] = []
    for turn in found:
        role = column_text(turn, "role" if turn.get("role") is not None else "from")
        role = _ROLES.get(role, role)
        if role == "assistant" and not any(earlier["role"] == "user" for earlier in turns):
            continue
        column = "content" if turn.get("content") is not None else "value"
        turns.append({"role": role, "content": column_text(turn, column, optional=role != "assistant")})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadSample("no assistant turn", "the conversation has no assistant turn after a user's")
    return turns


def _chat(turns: list[dict[str, str]], tokenizer: Any, mask_prompt: bool) -> list[Segment]:
    """Segments of a rendered conversation: an assistant's text and the tokens that end its turn count.

    Needs no ``{% generation %}`` in the template: the conversation is also rendered up to each assistant's turn and
    with it, and the turn's own text is searched for where the renderings diverge.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the rows are conversations, but the tokenizer has no chat template: take the model's instruct version, "
            "set tokenizer.chat_template and save it with the model, or use text or alpaca rows"
        )

    def render(count: int, **options: bool) -> str:
        """The first ``count`` turns as text."""
        return str(tokenizer.apply_chat_template(turns[:count], tokenize=False, **options))

    try:
        full = render(len(turns))
        if not mask_prompt:
            return Rendered([(full, True)])
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
    return Rendered([*found, (full[done:], False)])


def _shared(a: str, b: str) -> int:
    """Length of the common prefix."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
