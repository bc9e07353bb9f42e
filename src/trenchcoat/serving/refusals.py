"""Requests that are not answered: the status, the message and how values are quoted in it."""

from __future__ import annotations

from typing import Any

QUOTED_CHARACTERS = 60


class Refused(Exception):
    """A request that gets an error in OpenAI's form. `param` is the field that is at fault."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.headers = message, param, status, headers or {}

    def json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


def quoted(value: Any) -> str:
    """A client's value for a message: at most 60 characters of it, whatever its size."""
    if isinstance(value, str):
        value = value[:QUOTED_CHARACTERS]
    elif isinstance(value, list) and len(value) > 5:
        return f"a list of {len(value)} items"
    elif isinstance(value, dict) and len(value) > 5:
        return f"an object of {len(value)} fields"
    elif isinstance(value, int) and abs(value) > 2**64:
        return "a number of more than 64 bits"
    text = repr(value) if not isinstance(value, list | dict) else _short(value)
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}..."


def _short(value: list[Any] | dict[str, Any]) -> str:
    """A small list or object, one level deep."""
    if isinstance(value, list):
        return f"[{', '.join(_item(item) for item in value)}]"
    return f"{{{', '.join(f'{key[:QUOTED_CHARACTERS]!r}: {_item(item)}' for key, item in value.items())}}}"


def _item(value: Any) -> str:
    return "..." if isinstance(value, list | dict) and value else quoted(value)
