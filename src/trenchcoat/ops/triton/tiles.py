"""Launch settings tuned on a device (``trenchcoat bench tiles``), stored in a file by device name.

Nothing is tuned at import or during training: without an entry for the device and shape the settings are computed from
the sizes (`untuned` of :mod:`trenchcoat.ops.triton.launch`). Settings change a kernel's speed, never its results.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

_log = logging.getLogger("trenchcoat")

VARIABLE = "TRENCHCOAT_TILES"


@dataclass(frozen=True)
class Tile:
    """Warps of a program, and pipeline depth of its loads."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Choices:
    """The fastest settings found for one shape."""

    programs: int = 2
    """Programs per multiprocessor to aim for: rows are split into groups until there are about that many."""
    tiles: dict[str, Tile] = field(default_factory=dict)
    """Kernel name -> tile."""


def tiles_file() -> Path:
    """The file of tuned settings: TRENCHCOAT_TILES if set, else ``~/.cache/trenchcoat/tiles.json``."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "trenchcoat" / "tiles.json"


@lru_cache
def choices(device: str, signature: str, version: str) -> Choices:
    """The entry of a device and shape; the defaults if none was tuned with this version of triton.

    Raises:
        ValueError: the file is not what :func:`encoded` writes.
    """
    path = tiles_file()
    if not path.exists():
        return Choices()
    try:
        entry = json.loads(path.read_text(encoding="utf-8")).get(device, {}).get(signature)
        if entry is None:
            return Choices()
        if entry["triton"] != version:
            _log.info("%s: tuned with triton %s, not used with triton %s; %s", path, entry["triton"], version, AGAIN)
            return Choices()
        tiles = {name: _tile(pair) for name, pair in entry["tiles"].items()}
        programs = int(entry["programs"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of tuned settings ({error}); delete it, {AGAIN}") from error
    _log.info("%s: settings tuned on %s for %s", path, device, signature)
    return Choices(programs=programs, tiles=tiles)


AGAIN = "`trenchcoat bench tiles --device cuda` writes a new one"


def _tile(pair: Any) -> Tile:
    warps, stages = (int(n) for n in pair)
    if warps not in (1, 2, 4, 8, 16) or not 1 <= stages <= 8:
        raise ValueError(f"{warps} warps and {stages} stages")
    return Tile(warps, stages)


def encoded(found: Choices, version: str) -> dict[str, Any]:
    """An entry of the file."""
    return {
        "triton": version, "programs": found.programs,
        "tiles": {name: [tile.warps, tile.stages] for name, tile in found.tiles.items()},
    }  # fmt: skip
