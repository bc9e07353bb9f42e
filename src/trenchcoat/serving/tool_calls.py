"""Tool calls and reasoning in an answer, found by the parser of Transformers' own server.

The one file that depends on its internals (`transformers.cli.serving.utils`), which are not a public interface:
`tests/serving/test_tool_calls.py` states what we expect of them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    build_response_parser,
    get_response_template,
    response_events_to_chunks,
)


@dataclass(frozen=True)
class Part:
    """A part of an answer: text, reasoning, or a whole tool call (whose `text` is its arguments)."""

    text: str
    kind: str = "content"
    """content, reasoning or tool."""
    name: str = ""
    """Of the tool."""


class AnswerParser:
    """Splits the text of an answer, special tokens included, into parts."""

    def __init__(self, parser: Any) -> None:
        self.parser = parser
        self.first = _parts(parser.initial_events)

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, prompt: list[int], tools: list[dict[str, Any]] | None
    ) -> AnswerParser | None:
        """The parser for a model's answers; None if neither its tokenizer nor the library has one.

        It is shown the prompt only if that contains the beginning of an answer as the parser knows it, which other chat
        templates write differently: else it would take the whole prompt for a part of the answer.
        """
        template = get_response_template(tokenizer, model)
        if template is None:
            return None
        seen = prompt if _begins_answer(template, str(tokenizer.decode(prompt))) else []
        return cls(build_response_parser(tokenizer, model, torch.tensor([seen]), tools=tools))

    def push(self, text: str) -> list[Part]:
        """The parts that are complete with this text."""
        first, self.first = self.first, []
        return first + (_parts(self.parser.feed(text)) if text else [])

    def flush(self) -> list[Part]:
        """The rest; what breaks off within a tool call is left out."""
        try:
            _, events = self.parser.finalize()
        except (ValueError, RuntimeError) as error:
            logging.getLogger("trenchcoat.serving").info("an answer ends within a part: %s", type(error).__name__)
            return self.push("")
        return self.push("") + _parts(events)


def _begins_answer(template: dict[str, Any], prompt: str) -> bool:
    """Whether the prompt contains what begins an answer."""
    if "start_anchor_pattern" in template:
        return re.search(template["start_anchor_pattern"], prompt) is not None
    anchors = template["start_anchor"]
    return any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors))


def _parts(events: list[dict[str, Any]]) -> list[Part]:
    parts = []
    for item in response_events_to_chunks(events):
        if isinstance(item, ToolCall):
            parts.append(Part(item.arguments, "tool", item.name))
        else:
            parts.append(Part(str(item), "reasoning" if isinstance(item, ReasoningText) else "content"))
    return parts
