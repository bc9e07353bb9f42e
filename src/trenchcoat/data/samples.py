"""From text to tokens, and which of them count in the labels.

A sample is a list of segments ``(text, counted)`` (:mod:`trenchcoat.data.formats` makes them out of rows); the segments
are joined, tokenized together, and a token counts when it ends inside a counted segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trenchcoat.config import UserError
from trenchcoat.data.packing import Encoded
from trenchcoat.models.text import tokenize

Segment = tuple[str, bool]
Bos = Literal["auto", "always", "never"]
"""Values of ``data.bos``."""


class BadSample(UserError):
    """A row that cannot be trained on; ``reason`` is its category in the counts."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Rendered(list[Segment]):
    """The segments of a text that a chat template has written, with the special tokens that belong there."""


def column_names(row: Mapping[str, Any]) -> str:
    """The columns of a row, for messages."""
    return ", ".join(map(str, row)) or "(none)"


def columns_with_values(row: Mapping[str, Any]) -> str:
    """The columns of a row, and which of them are null, for messages."""
    empty = [str(name) for name, value in row.items() if value is None]
    return f"the columns {column_names(row)}" + (f" ({', '.join(empty)}: null)" if empty else "")


def column_text(row: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    """A column's text; an ``optional`` one may be blank, absent or null."""
    value = row.get(column)
    if value is None:
        if optional:
            return ""
        raise BadSample("missing column", f"expected a column {column!r}; found the columns {column_names(row)}")
    if not isinstance(value, str):
        raise BadSample("not text", f"column {column!r} holds {type(value).__name__}; expected a string")
    if not optional and not value.strip():
        raise BadSample(f"empty {column}", f"column {column!r} is empty")
    return value


def opening_tokens(tokenizer: Any, bos: Bos = "auto") -> list[int]:
    """What every text begins with: what the tokenizer itself puts there, its BOS token if it has one, or nothing."""
    if bos == "auto":
        plain = tokenize(tokenizer, "a", add_special_tokens=False, verbose=False)["input_ids"]
        framed = tokenize(tokenizer, "a", verbose=False)["input_ids"]
        starts = (i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        return list(framed[: next(starts, 0)])
    return [] if bos == "never" or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode(tokenizer: Any, samples: Sequence[list[Segment]], *, eos: bool, bos: Bos = "auto") -> list[Encoded]:
    """Tokens of each sample, in one call of the tokenizer: begun as ``data.bos`` says, with EOS last if there is one.

    An opening or EOS that the text already has (from a chat template) is not added twice; an added one counts if the
    token next to it does. An empty sample stays empty.
    """
    if not samples:
        return []
    if getattr(tokenizer, "is_fast", False):
        texts = ["".join(text for text, _ in sample) for sample in samples]
        batch = tokenize(tokenizer, texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces = [_fast_piece(sample, batch.encodings[i]) for i, sample in enumerate(samples)]
    else:
        pieces = [_slow_piece(tokenizer, sample) for sample in samples]
    opening, end = opening_tokens(tokenizer, bos), tokenizer.eos_token_id if eos else None
    openings = ([] if bos == "auto" and isinstance(sample, Rendered) else opening for sample in samples)
    return [_with_marks(*piece, first, end) for piece, first in zip(pieces, openings, strict=True)]


def _fast_piece(sample: list[Segment], encoding: Any) -> Encoded:
    ids = np.array(encoding.ids, dtype=np.int32)
    if all(counts for _, counts in sample):
        return ids, np.ones(len(ids), dtype=np.bool_)
    segment_ends = np.cumsum([len(text) for text, _ in sample])
    token_ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
    counts = np.array([counts for _, counts in sample], dtype=np.bool_)
    return ids, counts[np.minimum(np.searchsorted(segment_ends, token_ends), len(sample) - 1)]


def _slow_piece(tokenizer: Any, sample: list[Segment]) -> Encoded:
    """Without offsets: every segment tokenized by itself."""
    parts = [tokenize(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"] for text, _ in sample]
    ids = np.array([token for part in parts for token in part], dtype=np.int32)
    return ids, np.repeat([counts for _, counts in sample], [len(part) for part in parts]).astype(np.bool_)


def _with_marks(ids: NDArray[np.int32], counted: NDArray[np.bool_], opening: list[int], eos: int | None) -> Encoded:
    if len(ids) == 0:
        return ids, counted
    first = [] if ids[: len(opening)].tolist() == opening else opening
    last = [eos] if eos is not None and eos not in ids[-2:] else []  # chat templates close with EOS and a line break
    marked = np.concatenate([first, ids, last]).astype(np.int32)
    return marked, np.concatenate([np.repeat(counted[:1], len(first)), counted, np.repeat(counted[-1:], len(last))])
