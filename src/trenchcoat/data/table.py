"""Tokens of one source as three flat arrays, and their file on disk, memory-mapped when read."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trenchcoat.data.packing import Encoded
from trenchcoat.data.samples import BadSample
from trenchcoat.runtime.files import save_tensors


@dataclass(frozen=True)
class TokenTable:
    """All tokens of a source, row after row; a skipped row is an empty one."""

    tokens: NDArray[np.int32]
    """Token ids [n]."""
    counted: NDArray[np.bool_]
    """Whether a token counts in the labels [n]."""
    offsets: NDArray[np.int64]
    """Row r is tokens[offsets[r] : offsets[r + 1]]; [rows + 1]."""
    skipped: dict[str, int]
    """Rows skipped, by reason."""

    @property
    def rows(self) -> int:
        """Number of rows, skipped ones included."""
        return len(self.offsets) - 1


class TableBuilder:
    """Grows a ``TokenTable`` row by row, in 5 bytes per token."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self.counted = bytearray()
        self.offsets = array("q", [0])
        self.skipped: Counter[str] = Counter()
        self.first_problem = ""

    def note(self, bad: BadSample) -> None:
        """Count a bad sample; it is not yet a row."""
        self.first_problem = self.first_problem or f"; the first problem: {bad}"
        self.skipped[bad.reason] += 1

    def extend(self, rows: Iterable[Encoded | BadSample]) -> None:
        """Append rows, each as token ids [n] and whether they count [n]; a bad sample is counted, and an empty row."""
        for row in rows:
            if isinstance(row, BadSample):
                self.note(row)
                self.offsets.append(len(self.tokens))
                continue
            ids, counted = row
            self.tokens.frombytes(ids.tobytes())
            self.counted += counted.tobytes()
            self.offsets.append(len(self.tokens))

    def table(self) -> TokenTable:
        """What was added so far, without a copy."""
        return TokenTable(
            np.frombuffer(self.tokens, dtype=np.int32),
            np.frombuffer(self.counted, dtype=np.bool_),
            np.frombuffer(self.offsets, dtype=np.int64),
            dict(self.skipped),
        )


def _checksum(table: TokenTable) -> str:
    digest = hashlib.sha256()
    for part in (table.tokens, table.counted, table.offsets):
        digest.update(part.data)
    return digest.hexdigest()


def save_table(path: Path, table: TokenTable) -> None:
    """Write ``table`` atomically as safetensors; raises ``files.SaveError``."""
    tensors = {name: torch.from_numpy(getattr(table, name)) for name in ("tokens", "counted", "offsets")}
    save_tensors(path, tensors, {"sha256": _checksum(table), "skipped": json.dumps(table.skipped)})


def load_table(path: Path) -> TokenTable | None:
    """The table at ``path``, memory-mapped; None when the file is absent or damaged (its checksum is compared)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            record = file.metadata()
            arrays = {name: file.get_tensor(name).numpy() for name in ("tokens", "counted", "offsets")}
        table = TokenTable(skipped=json.loads(record["skipped"]), **arrays)
        return table if _checksum(table) == record["sha256"] else None
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return None
