"""Measurements on this machine, one module each, with ``measure(...) -> dict`` and ``table(dict) -> str``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from trenchcoat.files import write_json


def run(name: str, *, out: str | None = None, **settings: Any) -> str:
    """``trenchcoat bench NAME``: measure with ``settings``, write JSON to ``out`` when given, return the table."""
    module = importlib.import_module(f"trenchcoat.bench.{name}")
    result = module.measure(**settings)
    if out is not None:
        write_json(Path(out), result)
    text: str = module.table(result)
    return text
