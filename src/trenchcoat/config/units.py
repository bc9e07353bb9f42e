"""Parse and format sizes, token counts and durations."""

from __future__ import annotations

import math
import re
from typing import Literal

from trenchcoat.config.errors import UserError

GIB = 1 << 30
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


def parse_size(
    text: str, what: str, *, binary: bool = False, expected: str = "a size such as 80GB, 2TB or 3GB/s"
) -> float:
    """`80GB`, `1.5 TB`, `3GB/s`, `640MiB`, `10M` as a number; ``binary`` takes GB as 2^30 (as GPU makers do).

    ``UserError`` for anything else, naming the option ``what`` and what is ``expected``.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgtp]?)(i?)(?:b|bytes)?(?:/s)?\s*", text, flags=re.IGNORECASE)
    number = _number(match)
    if match is None or not number > 0:
        raise UserError(f"{what} must be {expected}, got {text!r}")
    decimal = _UNITS[match.group(2).lower()]
    return number * (2.0 ** (10 * round(math.log10(decimal) / 3)) if binary or match.group(3) else decimal)


def parse_tokens(text: str, what: str = "blocks.pass_tokens") -> int | Literal["all", "auto"]:
    """`all`, `auto`, or a number of tokens: `250000`, `1M` (1000000), `2.5M`, `1G`.

    ``UserError`` for anything else, naming the setting ``what``.
    """
    word = text.strip().lower()
    if word == "all":
        return "all"
    if word == "auto":
        return "auto"
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?)", word)
    number = _number(match) * (1.0 if match is None else _UNITS[match.group(2)])
    if not (number >= 1 and number.is_integer()):
        raise UserError(
            f"{what} must be `all`, `auto` or a number of tokens of at least 1, such as 250000 or 1M, got {text!r}"
        )
    return int(number)


def _number(match: re.Match[str] | None) -> float:
    try:
        return float(match.group(1)) if match else math.nan
    except ValueError:
        return math.nan


def gib(size: float) -> str:
    """`23.3 GiB`."""
    return f"{size / GIB:.1f} GiB"


def tera(size: float) -> str:
    """`25 MB`, `812 GB` or `1.62 TB`."""
    for unit, name, digits in ((1e12, "TB", ".2f"), (1e9, "GB", ".3g")):
        if size >= unit:
            return f"{size / unit:{digits}} {name}"
    return f"{size / 1e6:.3g} MB"


def in_words(seconds: float) -> str:
    """``40 s``, ``4 min``, ``7.5 h``."""
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
