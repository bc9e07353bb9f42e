"""Validation of requests: unsupported fields and values out of range are refused, not ignored.

Imported only when serving: it needs the extra `serve`.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Mapping
from math import inf
from typing import Any

from fastapi import HTTPException

CLIENT_GONE: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("client_gone", default=None)
"""Set once the client of the current request has disconnected."""

_HARMLESS = {"user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls"}
"""Fields that can be ignored without misleading the client."""

_DEFAULTS: dict[str, tuple[Any, ...]] = {"n": (1,), "best_of": (1,), "presence_penalty": (0,)}
"""Values that equal the server's behaviour; None, False and an empty list always do."""

_NUMBERS: dict[str, tuple[type, float, float, str]] = {
    "temperature": (float, 0.0, 2.0, "a number from 0 to 2"),
    "top_p": (float, 1e-6, 1.0, "a number from 1e-06 to 1"),
    "frequency_penalty": (float, -0.99, 2.0, "a number from -0.99 to 2"),
    "max_tokens": (int, 1, inf, "a whole number of at least 1"),
    "max_completion_tokens": (int, 1, inf, "a whole number of at least 1"),
    "seed": (int, -inf, inf, "a whole number"),
}


def refuse(message: str) -> HTTPException:
    """The HTTP 400 error for an invalid request."""
    return HTTPException(status_code=400, detail=message)


def check_body(body: Mapping[str, Any], unsupported: set[str]) -> None:
    """Raise a 400 naming the first field that is not supported or whose value is out of range."""
    for name in sorted(body.keys() & (unsupported - _HARMLESS)):
        value = body[name]
        if value is not None and value is not False and value != [] and value not in _DEFAULTS.get(name, ()):
            raise refuse(f"{name}={value!r} is not available on this server; leave it out")
    for name, (kind, low, high, expected) in _NUMBERS.items():
        value = body.get(name)
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high):
            raise refuse(f"{name} is {value!r}; expected {expected}")
    stop = body.get("stop")
    texts = stop if isinstance(stop, list) and stop else [stop]
    if stop is not None and not all(isinstance(text, str) for text in texts):
        raise refuse(f"stop is {stop!r}; expected a string or a list of strings")
