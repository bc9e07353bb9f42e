"""The messages and tools of a chat request, in the form that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from trenchcoat.serving.refusals import Refused, quoted

MAX_MESSAGES = 4096
MAX_TOOLS = 128

_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning")
"""Fields of a message that templates may read, besides role, content and tool_calls."""


def read_messages(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    """Messages with their content as one text and the arguments of tool calls as objects.

    Raises Refused for anything in them that the template would not see, such as a picture.
    """
    if not isinstance(value, list) or not value:
        raise Refused(f"messages is {quoted(value)}; expected a list of at least one message", name)
    if len(value) > MAX_MESSAGES:
        raise Refused(f"messages has {len(value)} messages; expected at most {MAX_MESSAGES}", name)
    return tuple(_message(f"messages[{place}]", message) for place, message in enumerate(value))


def read_tools(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions, as they are."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise Refused(f"tools is {quoted(value)}; expected a list of at most {MAX_TOOLS} tools", name)
    for place, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"tools[{place}] is {quoted(tool)}; expected a function with a name", name)
    return tuple(value)


def _message(place: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Refused(f"{place} is {quoted(message)}; expected an object with role and content", "messages")
    given = {name: value for name, value in message.items() if value is not None and value != [] and value != {}}
    role = given.pop("role", None)
    if not isinstance(role, str):
        raise Refused(f"{place}.role is {quoted(role)}; expected a text such as 'user'", "messages")
    read: dict[str, Any] = {"role": role, "content": _content(place, given.pop("content", ""))}
    if "tool_calls" in given:
        read["tool_calls"] = _tool_calls(place, given.pop("tool_calls"))
    for name in _TEXTS:
        if name in given:
            text = given.pop(name)
            if not isinstance(text, str):
                raise Refused(f"{place}.{name} is {quoted(text)}; expected a string", "messages")
            read[name] = text
    if given:
        raise Refused(f"{place} has {quoted(min(given))}, which this server cannot read; leave it out", "messages")
    return read


def _content(place: str, content: Any) -> str:
    """The text of a message, which may be given as a list of parts."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused(f"{place}.content is {quoted(content)}; expected a string or a list of parts", "messages")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text"):
            raise Refused(f"{place}.content has a part of type {quoted(kind)}; this server reads text only", "messages")
        if not isinstance(part.get("text"), str):
            raise Refused(f"{place}.content has a part whose text is {quoted(part.get('text'))}", "messages")
        texts.append(part["text"])
    return " ".join(texts)


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which templates iterate over."""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{place}.tool_calls has {quoted(call)}; expected a function with a name", "messages")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise Refused(f"{place}.tool_calls has arguments that are not JSON: {error}", "messages") from error
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read
