"""Measurements on this machine, one module each, with ``measure(...) -> dict`` and ``table(dict) -> str``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trenchcoat.runtime.files import write_json

STEPWISE = ("kernels",)
"""Benchmarks of many minutes, which hand over what they have as they go (``keep``, ``say``)."""


def run(name: str, *, out: str | None = None, say: Callable[[str], None] | None = None, **settings: Any) -> str:
    """``trenchcoat bench NAME``: measure with ``settings``, write JSON to ``out`` when given, return the table.

    ``say`` is given lines of progress by the benchmarks that take long.
    """
    module = importlib.import_module(f"trenchcoat.bench.{name}")
    if name in STEPWISE:
        settings |= {"say": say, "keep": None if out is None else partial(write_json, Path(out))}
    result = module.measure(**settings)
    if out is not None:
        write_json(Path(out), result)
    text: str = module.table(result)
    return text
