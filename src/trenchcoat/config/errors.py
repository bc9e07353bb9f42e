"""The errors that the command line shows as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake: the message names the value, what was expected and the fix, in one line."""

    reported = False
    """Whether another process has shown the message already."""


class UsageError(UserError):
    """The command line or the recipe is wrong; nothing was started."""
