"""Conversations: the turns of a row, and the text that the tokenizer's chat template writes for them.

Turns reach the template whole: tool calls, reasoning and whatever else a turn holds, with the row's tools.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateError

from trenchcoat.config import UserError
from trenchcoat.data.samples import BadSample, Rendered, Segment, column_names, column_text

Turn = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
"""Names of roles in ShareGPT and its kind -> those of chat templates."""

_KNOWN = {"user", "assistant", "system", "developer", "tool", "ipython", *_ROLES}
_PLAIN = {"role", "content"}
_THOUGHT = "</think>"


@functools.cache
def _say(text: str) -> None:
    """Warn, once in a process."""
    warnings.warn(text, stacklevel=2)


def read_turns(row: Mapping[str, Any]) -> list[Turn]:
    """The conversation of a row, as turns with a role and content and whatever else they hold.

    Reads ``{from, value}`` too, and the columns ``system`` and ``history`` (what was said before). Drops assistant
    turns before the first user turn. In ``conversations`` with ``{role, content}`` (Long-LLM), the first turn is
    skipped if it is not the user's, even a system prompt. Raises ``BadSample`` for what is no conversation.
    """
    found = row["messages"] if row.get("messages") is not None else row.get("conversations")
    if not isinstance(found, list) or not all(isinstance(turn, Mapping) for turn in found):
        raise BadSample(
            "missing column",
            f"expected a list of turns in messages or conversations; found the columns {column_names(row)}",
        )
    if row.get("messages") is None and found and found[0].get("role") not in (None, "user", "human"):
        found = found[1:]
    turns = _before(row, found)
    for turn in map(_read_turn, found):
        if turn["role"] != "assistant" or any(earlier["role"] == "user" for earlier in turns):
            turns.append(turn)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadSample("no assistant turn", "the conversation has no assistant turn after a user's")
    return turns


def _before(row: Mapping[str, Any], found: list[Mapping[str, Any]]) -> list[Turn]:
    """The turns of the columns ``system`` (unless the conversation has its own) and ``history``."""
    system = column_text(row, "system", optional=True)
    own = any(turn.get("role", turn.get("from")) == "system" for turn in found)
    turns: list[Turn] = [{"role": "system", "content": system}] if system and not own else []
    history = row.get("history") or []
    if isinstance(history, list) and all(isinstance(turn, Mapping) for turn in history):
        return [*turns, *map(_read_turn, history)]
    for question, answer in history_pairs(row):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def history_pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of the column ``history``; none where it is absent."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise BadSample("not text", "column 'history' should hold a list of [question, answer] pairs")
    return [(question, answer) for question, answer in history]


def _read_turn(given: Mapping[str, Any]) -> Turn:
    named = column_text(given, "role" if given.get("role") is not None else "from")
    if named not in _KNOWN:
        _say(f"a conversation has the role {named!r}, which is handed to the chat template as it is; its turns are not "
             f"trained on (known roles: {', '.join(sorted(_KNOWN))})")  # fmt: skip
    role = _ROLES.get(named, named)
    turn = {name: value for name, value in given.items() if value is not None and name not in ("from", "value")}
    turn = {**turn, "role": role, "content": _content(given, named)}
    calls = turn.get("tool_calls") or (_called(turn["content"]) if named == "function_call" else None)
    if calls:
        turn |= {"tool_calls": [_with_arguments(call) for call in calls]}
        turn["content"] = "" if named == "function_call" else turn["content"]
    return turn


def _content(given: Mapping[str, Any], role: str) -> Any:
    """The text of a turn: of one with tool calls none is needed, and a tool may answer with an object."""
    column = "value" if given.get("content") is None and given.get("value") is not None else "content"
    content = given.get(column)
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        if not all(isinstance(part.get("text"), str) for part in content):
            raise BadSample("not text", f"column {column!r} holds a part that is not text")
        given = {**given, column: "".join(part["text"] for part in content)}
    elif _ROLES.get(role, role) == "tool" and content is not None and not isinstance(content, str):
        return content
    answers = _ROLES.get(role, role) == "assistant" and not given.get("tool_calls")
    if content is None and answers:
        raise BadSample(
            "missing column",
            f"an assistant's turn has neither text nor tool calls; found the columns {column_names(given)}",
        )
    return column_text(given, column, optional=not answers)


def _called(text: str) -> list[Turn] | None:
    """The calls that a ``function_call`` turn writes as JSON; None for other text, which stays an answer."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": dict(call)} for call in calls]


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates expect; data often holds them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The column ``tools``: a list, or JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadSample("not JSON", f"column 'tools' holds text that is not JSON ({error})") from error
    if tools and not isinstance(tools, list):
        raise BadSample("not a list", f"column 'tools' holds {type(tools).__name__}; expected a list of tools")
    return tools or None


def rendered(turns: list[Turn], row: Mapping[str, Any], tokenizer: Any, mask_prompt: bool) -> Rendered:
    """Segments of a rendered conversation: an assistant's text and the tokens that end its turn count.

    Where the template changes earlier answers once more is said (it removes their reasoning), only the last one counts:
    the others are not the text that the model would have written. ``UserError`` for a tokenizer without a template,
    ``BadSample`` for a conversation that the template refuses.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the rows are conversations, but the tokenizer has no chat template: take the model's instruct version, "
            "set tokenizer.chat_template and save it with the model, or use text or alpaca rows"
        )
    text = _Conversation(turns, _tools(row), tokenizer)
    try:
        full = text.render(len(turns))
        return Rendered([(full, True)] if not mask_prompt else text.segments(full))
    except TemplateError as error:
        raise BadSample("chat template", f"the chat template refuses the conversation: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise BadSample("chat template", f"the chat template fails on the conversation: {error}") from error


class _Conversation:
    """Turns, and where the template puts the answers among them.

    Needs no ``{% generation %}`` in the template: the conversation is also rendered up to each assistant's turn and
    with it, and the turn's own text is searched for where the renderings diverge.
    """

    def __init__(self, turns: list[Turn], tools: list[Any] | None, tokenizer: Any) -> None:
        self.turns, self.tools, self.tokenizer = turns, tools, tokenizer

    def render(self, count: int, **options: bool) -> str:
        """The first ``count`` turns as text."""
        more: dict[str, Any] = options if self.tools is None else {**options, "tools": self.tools}
        return str(self.tokenizer.apply_chat_template(self.turns[:count], tokenize=False, **more))

    def segments(self, full: str) -> list[Segment]:
        """``full``, cut where what counts begins and ends."""
        answers = [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        spans: list[tuple[int, int]] = []
        for i in answers:
            span = self._span(i, full, spans[-1][1] if spans else 0)
            if span is None:
                return self._last_alone(answers[-1], rewritten=i + 1 < len(self.turns))
            spans.append(span)
        return list(_cut(full, spans))

    def _last_alone(self, last: int, *, rewritten: bool) -> list[Segment]:
        """The conversation up to its last answer, which alone counts."""
        full = self.render(last + 1)
        span = self._span(last, full, 0) if rewritten else None
        if span is None:
            raise BadSample("chat template", f"the chat template does not reproduce the text of turn {last + 1}")
        _say(
            "the chat template rewrites earlier answers (it removes their reasoning), so only the last answer of such "
            "a conversation is trained on"
        )
        return list(_cut(full, [span]))

    def _span(self, i: int, full: str, done: int) -> tuple[int, int] | None:
        """Where the text of turn ``i`` begins and its ending tokens end in ``full``, after ``done``; None if it is not
        there."""
        turn = self.turns[i]
        text = turn["content"].strip()
        before, until = self.render(i, add_generation_prompt=True), self.render(i + 1)
        opening, same = _shared(before, full), _shared(until, full)
        if not turn.keys() <= _PLAIN or _THOUGHT in text:  # more than its text: all that the template writes for it
            whole = same >= len(until.rstrip()) and same > opening >= done
            return (opening, same) if whole else None
        start = full.find(text, max(done, opening))
        last = until.find(text, _shared(before, until))
        if start < 0 or last < 0:
            return None
        end = start + len(text)
        return start, end + _shared(until[last + len(text) :], full[end:])


def _cut(full: str, spans: list[tuple[int, int]]) -> Iterator[Segment]:
    done = 0
    for start, end in spans:
        yield full[done:start], False
        yield full[start:end], True
        done = end
    yield full[done:], False


def _shared(a: str, b: str) -> int:
    """Length of the common prefix."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
