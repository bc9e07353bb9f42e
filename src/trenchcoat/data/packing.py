"""Rows of a fixed length out of a flat stream of tokens: index arithmetic, no token is copied before its batch.

Dropped samples leave gaps in the flat arrays. Rows are therefore slices of the *kept* stream, whose positions skip the
gaps; without gaps they are positions of the arrays themselves.

Shapes: n tokens of the arrays, S samples, K gapless runs of kept samples, R rows, b rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a token that does not count, as everywhere in Transformers."""
_ROWS_AT_ONCE = 4096
"""Rows whose labels are checked together, so that a memory-mapped table is never loaded as a whole."""

Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids [n] and whether each counts in the labels [n]."""


def padded_batch(rows: Sequence[Encoded], seq_len: int, pad: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of ``rows``, each int64 [b, T], padded on the right with ``pad``."""
    import torch

    shape = (len(rows), seq_len)
    ids, mask, labels = np.full(shape, pad), np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED)
    for i, (tokens, counted) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        labels[i, : len(tokens)] = np.where(counted, tokens, IGNORED)
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(values) for name, values in named.items()}


@dataclass(frozen=True)
class _Runs:
    """The kept stream as runs of the arrays."""

    first: NDArray[np.int64]
    """Where each run begins in the arrays [K]."""
    at: NDArray[np.int64]
    """Where each run begins in the kept stream, and its end [K + 1]."""

    def slice(self, array: NDArray[Any], start: int, length: int) -> NDArray[Any]:
        """``length`` elements of ``array`` from position ``start`` of the kept stream."""
        run = int(np.searchsorted(self.at, start, "right")) - 1
        parts = []
        while length > 0:
            take = min(length, int(self.at[run + 1]) - start)
            place = int(self.first[run]) + start - int(self.at[run])
            parts.append(array[place : place + take])
            start, length, run = start + take, length - take, run + 1
        return parts[0] if len(parts) == 1 else np.concatenate([array[:0], *parts])


@dataclass(frozen=True)
class PackedRows:
    """Rows as slices of a stream."""

    tokens: NDArray[np.int32]
    """The arrays' tokens [n]."""
    counted: NDArray[np.bool_]
    """Whether a token counts in the labels [n]."""
    runs: _Runs
    """Which of them are kept."""
    starts: NDArray[np.int64]
    """First token of each row in the kept stream [R]."""
    lengths: NDArray[np.int64]
    """Tokens of each row [R], at most T."""
    seq_len: int
    """T."""
    tokens_cut: int
    """Tokens left over at the end of the stream."""
    rows_masked: int
    """Rows dropped because no label counts."""

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> Encoded:
        """Tokens of one row, without padding."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        return self.runs.slice(self.tokens, start, length), self.runs.slice(self.counted, start, length)

    def batch(self, rows: NDArray[np.int64], pad: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels of ``rows`` [b], each int64 [b, T], padded on the right with ``pad``."""
        return padded_batch([self.row(int(row)) for row in rows], self.seq_len, pad)


def pack(
    tokens: NDArray[np.int32],
    counted: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    *,
    seq_len: int,
    contiguous: bool,
    keep: NDArray[np.bool_] | None = None,
) -> PackedRows:
    """Rows of at most ``seq_len`` tokens out of the samples ``offsets[i] : offsets[i + 1]`` where ``keep[i]`` (null:
    all).

    Across samples, they are one stream, cut every ``seq_len`` tokens, and the remainder is left over. ``contiguous``:
    each sample is cut by itself, and its last piece may be short. A row without a counted token after its first is
    dropped: labels are shifted by one, so its loss would be a mean over no tokens.
    """
    sizes = np.diff(offsets) if keep is None else np.where(keep, np.diff(offsets), 0)
    at = int(offsets[0]) + np.concatenate([[0], np.cumsum(sizes)])  # of each sample in the kept stream [S + 1]
    first, stop = int(at[0]), int(at[-1])
    if contiguous:
        pieces = -(-sizes // seq_len)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(at[:-1], pieces) + number * seq_len
        lengths = np.minimum(np.repeat(at[1:], pieces) - starts, seq_len)
    else:
        starts = np.arange(first, stop - seq_len + 1, seq_len)
        lengths = np.full(len(starts), seq_len)
    runs = _runs(offsets, sizes)
    useful = _with_labels(counted, runs, starts, lengths)
    return PackedRows(
        tokens,
        counted,
        runs,
        starts[useful],
        lengths[useful],
        seq_len,
        tokens_cut=stop - first - int(lengths.sum()),
        rows_masked=int((~useful).sum()),
    )


def _runs(offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> _Runs:
    """Merge neighbouring samples of ``sizes`` (0: left out) into runs."""
    kept = np.flatnonzero(sizes)
    if not len(kept):
        return _Runs(offsets[:0], offsets[:1])
    gap = np.flatnonzero(offsets[kept[1:]] != offsets[kept[:-1] + 1])
    first = offsets[kept[np.concatenate([[0], gap + 1])]]
    stop = offsets[kept[np.concatenate([gap, [len(kept) - 1]])] + 1]
    return _Runs(first, int(offsets[0]) + np.concatenate([[0], np.cumsum(stop - first)]))


def _with_labels(
    counted: NDArray[np.bool_], runs: _Runs, starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether a token after each row's first counts [R]."""
    useful = np.zeros(len(starts), dtype=np.bool_)
    for begin in range(0, len(starts), _ROWS_AT_ONCE):
        some = slice(begin, begin + _ROWS_AT_ONCE)
        first, stop = int(starts[some][0]), int(starts[some][-1] + lengths[some][-1])
        targets = np.flatnonzero(runs.slice(counted, first, stop - first)) + first
        ends = starts[some] + lengths[some]
        useful[some] = np.searchsorted(targets, starts[some] + 1) < np.searchsorted(targets, ends)
    return useful
