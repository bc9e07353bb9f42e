"""The formats of rows: which columns each has, its template, and which part of the text counts in the labels.

A format is one class and its line in ``FORMATS``. Alpaca prompts are the Alpaca project's two templates
(https://github.com/tatsu-lab/stanford_alpaca), with a line break after "### Response:" as LoLCATs (arXiv 2410.10254)
trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from trenchcoat.config import DataConfig
from trenchcoat.data.chat import history_pairs, read_turns, rendered
from trenchcoat.data.samples import BadSample, Segment, column_text, columns_with_values

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
    """{instruction, input, output}; the input may be absent, and so may a system text and earlier turns (history)."""

    def columns(self, cfg: DataConfig) -> str:
        """The required columns, and the optional one."""
        return "instruction and output (and input)"

    def matches(self, found: set[str], cfg: DataConfig) -> bool:
        """Whether it has an instruction and an output."""
        return {"instruction", "output"} <= found

    def segments(self, row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
        """The prompt, and the output; before them the system text and earlier turns, whose answers count too."""
        fields = {"instruction": column_text(row, "instruction"), "input": column_text(row, "input", optional=True)}
        prompt = (PROMPT_WITH_INPUT if fields["input"] else PROMPT_WITHOUT_INPUT).format_map(fields)
        system = column_text(row, "system", optional=True)
        found = [(f"{system}\n\n", not cfg.mask_prompt)] if system else []
        for question, answer in history_pairs(row):
            asked = PROMPT_WITHOUT_INPUT.format(instruction=question)
            found += [(asked, not cfg.mask_prompt), (answer, True), ("\n\n", not cfg.mask_prompt)]
        return [*found, (prompt, not cfg.mask_prompt), (column_text(row, "output"), True)]


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
        return "messages, or conversations (and system, tools, history)"

    def matches(self, found: set[str], cfg: DataConfig) -> bool:
        """Whether it has one of them."""
        return bool(found & {"messages", "conversations"})

    def segments(self, row: Mapping[str, Any], cfg: DataConfig, tokenizer: Any) -> list[Segment]:
        """The rendered conversation; ``UserError`` when the tokenizer has no chat template."""
        return rendered(read_turns(row), row, tokenizer, cfg.mask_prompt)


FORMATS: dict[str, RowFormat] = {"alpaca": AlpacaFormat(), "text": TextFormat(), "chat": ChatFormat()}
"""Value of ``data.format`` -> format; ``auto`` takes the first that matches a row. Add yours here."""


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
        f"found {columns_with_values(row)}; expected "
        f"{', or '.join(each.columns(cfg) for each in FORMATS.values())}: set data.text_column, or rename the columns",
    )
