"""The errors that the command line shows as one line, without a traceback."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class UserError(ValueError):
    """A user's mistake: the message names the value, what was expected and the fix, in one line."""

    reported = False
    """Whether another process has shown the message already."""


class UsageError(UserError):
    """The command line or the recipe is wrong; nothing was started."""


class refusals:
    """A context that turns errors of a library inside the block into the ``UserError`` of ``explain(error)``.

    They are errors of the given ``kinds``, and ``Exception`` itself (none of its subclasses), which the tokenizers
    library raises. A ``UserError`` passes as it is.
    """

    def __init__(self, explain: Callable[[BaseException], str], kinds: tuple[type[BaseException], ...]) -> None:
        self.explain, self.kinds = explain, kinds

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise the ``UserError``."""
        if error is None or isinstance(error, UserError):
            return
        if kind is Exception or isinstance(error, self.kinds):
            raise UserError(self.explain(error)) from error
