"""What a client may ask for: every field of a request, with its bounds. Everything else is refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from trenchcoat.serving.messages import read_messages, read_tools
from trenchcoat.serving.refusals import Refused, quoted

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_CHOICES = 32
"""Texts that one request may ask for: prompts times ``n``."""
MAX_BIASES = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that has been read; None or an empty value where the client left a field out."""

    model: str | None = None
    prompts: tuple[str | list[int], ...] = ()
    """Of completions: texts or token ids."""
    messages: tuple[dict[str, Any], ...] = ()
    """Of chat."""
    tools: tuple[dict[str, Any], ...] = ()
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    """Alternatives listed for each token; None: no probabilities at all."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    @property
    def chat(self) -> bool:
        """Whether this is a chat request."""
        return bool(self.messages)


Reader = Callable[[str, Any], Any]
"""(field, value) -> what is kept of it; raises Refused. None is never passed: it means that the field is left out."""


def _whole(low: float, high: float, expected: str) -> Reader:
    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Refused(f"{name} is {quoted(value)}; expected {expected}", name)
        return value

    return read


def _number(low: float, high: float) -> Reader:
    def read(name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise Refused(f"{name} is {quoted(value)}; expected a number from {low:g} to {high:g}", name)
        return float(value)

    return read


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused(f"{name} is {quoted(value)}; expected true or false", name)
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"{name} is {quoted(value)}; expected a string", name)
    return value


def _anything(name: str, value: Any) -> None:
    """A field that can be ignored without misleading the client."""


def _only(*allowed: Any) -> Reader:
    """A field that changes nothing with these values, and is not available with others."""

    def read(name: str, value: Any) -> None:
        if not any(value == each and type(value) is type(each) for each in allowed):
            raise Refused(f"{name}={quoted(value)} is not available on this server; leave it out", name)

    return read


def _stop(name: str, value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts[: MAX_STOPS + 1]):
        expected = f"a string or a list of strings, of 1 to {MAX_STOP_LENGTH} characters each"
        raise Refused(f"stop is {quoted(value)}; expected {expected}", name)
    if len(texts) > MAX_STOPS:
        raise Refused(f"stop has {len(texts)} strings; expected at most {MAX_STOPS}", name)
    return tuple(texts)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise Refused(f"logit_bias is {quoted(value)}; expected an object of at most {MAX_BIASES} token ids", name)
    read = _number(-100, 100)
    biases: dict[int, float] = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise Refused(f"logit_bias names {quoted(token)}; expected a token id", name)
        biases[int(token)] = read(f"logit_bias of {token}", bias)
    return biases


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompts(name: str, value: Any) -> tuple[str | list[int], ...]:
    """The four forms of a prompt: a text, a list of texts, token ids, a list of lists of token ids."""
    given = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(given, list) or not given:
        given = [None]
    for item in given:
        if not isinstance(item, str) and not _is_ids(item):
            raise Refused(f"prompt is {quoted(value)}; expected a string, token ids, or a list of either", name)
    return tuple(given)


def _stream_options(name: str, value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise Refused(f"stream_options is {quoted(value)}; expected an object with include_usage", name)
    for key, flag in value.items():
        if flag is not None:
            _flag(f"stream_options.{key}", flag)
    return bool(value.get("include_usage"))


_UNAVAILABLE = _only(False, [], {})

SHARED: dict[str, Reader] = {
    "model": _text,
    "max_tokens": _whole(1, inf, "a whole number of at least 1"),
    "n": _whole(1, MAX_CHOICES, f"a whole number from 1 to {MAX_CHOICES}"),
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "top_k": _whole(-1, inf, "a whole number of at least 1, or 0 or -1 for no limit"),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.1, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _logit_bias,
    "seed": _whole(-(2**63), 2**63 - 1, "a whole number of at most 64 bits"),
    "stop": _stop,
    "stream": _flag,
    "stream_options": _stream_options,
    "user": _anything,
    "metadata": _anything,
    "store": _anything,
    "service_tier": _anything,
    "safety_identifier": _anything,
    "prompt_cache_key": _anything,
}
"""Fields of both routes."""

COMPLETION = SHARED | {
    "prompt": _prompts,
    "echo": _flag,
    "logprobs": _whole(0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}"),
    "best_of": _only(1),
    "suffix": _only(""),
}
"""Fields of ``/v1/completions``."""

CHAT = SHARED | {
    "messages": read_messages,
    "tools": read_tools,
    "tool_choice": _only("auto", "none"),
    "parallel_tool_calls": _anything,
    "max_completion_tokens": _whole(1, inf, "a whole number of at least 1"),
    "logprobs": _flag,
    "top_logprobs": _whole(0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}"),
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
    **dict.fromkeys(("audio", "function_call", "functions", "prediction", "reasoning_effort"), _UNAVAILABLE),
    **dict.fromkeys(("verbosity", "web_search_options"), _UNAVAILABLE),
}
"""Fields of ``/v1/chat/completions``."""


def read_request(body: Any, *, chat: bool) -> Request:
    """A request from its JSON. Raises Refused naming the first field that is unknown or out of bounds."""
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    readers = CHAT if chat else COMPLETION
    unknown = sorted(body.keys() - readers.keys())
    if unknown:
        raise Refused(f"{quoted(unknown[0])} is not a field that this server knows; leave it out", unknown[0][:100])
    given = {name: value for name, value in body.items() if value is not None}
    if not chat and given.get("echo") is True and given.get("max_tokens") == 0:
        readers = readers | {"max_tokens": _whole(0, inf, "a whole number")}
    fields = {name: readers[name](name, value) for name, value in given.items()}
    required = "messages" if chat else "prompt"
    if required not in fields:
        raise Refused(f"the request lacks {required!r}", required)
    request = _chat_request(fields, given) if chat else _completion_request(fields)
    choices = max(len(request.prompts), 1) * request.n
    if choices > MAX_CHOICES:
        raise Refused(f"the request asks for {choices} texts; this server writes at most {MAX_CHOICES} a request", "n")
    return request


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a Request has under the same name, with a value."""
    return {name: value for name, value in fields.items() if name in Request.__dataclass_fields__ and value is not None}


def _completion_request(fields: dict[str, Any]) -> Request:
    return Request(**_known(fields), prompts=fields["prompt"], include_usage=fields.get("stream_options", False))


def _chat_request(fields: dict[str, Any], given: Mapping[str, Any]) -> Request:
    wanted, top = fields.pop("logprobs", False), fields.pop("top_logprobs", None)
    if top and not wanted:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    if given.get("tool_choice") == "none":
        fields.pop("tools", None)
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields["max_completion_tokens"]
    logprobs = (top or 0) if wanted else None
    return Request(**_known(fields), logprobs=logprobs, include_usage=fields.get("stream_options", False))
