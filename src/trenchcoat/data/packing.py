"""Rows of a fixed length out of a flat stream of tokens: pure index arithmetic, no token is copied.

Shapes: n tokens, R rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""Label of a token that does not count, as everywhere in Transformers."""


@dataclass(frozen=True)
class PackedRows:
    """Where each row lies in the stream."""

    starts: NDArray[np.int64]
    """First token of each row [R]."""
    lengths: NDArray[np.int64]
    """Tokens of each row [R], at most T."""
    tokens: int
    """Tokens in all rows."""
    cut: int
    """Tokens left over at the end (across)."""
    masked: int
    """Rows dropped because no label counts."""


def pack(
    offsets: NDArray[np.int64], counted: NDArray[np.bool_], *, seq_len: int, contiguous: bool
) -> PackedRows:
    """Rows of at most ``seq_len`` tokens out of the samples ``offsets[i] : offsets[i + 1]``.

    Across samples (default) the samples are one stream, cut every ``seq_len`` tokens, and the remainder is left over.
    ``contiguous``: each sample is cut by itself, and its last piece may be short. A row without a counted token
    after its first is dropped: labels are shifted by one, so its loss would be a mean of nothing.
    """
    if contiguous:
        sizes = np.diff(offsets)
        pieces = -(-sizes // seq_len)
        within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(offsets[:-1], pieces) + within * seq_len
        lengths = np.minimum(seq_len, np.repeat(offsets[1:], pieces) - starts)
    else:
        starts = np.arange(offsets[0], offsets[-1] - seq_len + 1, seq_len)
        lengths = np.full(len(starts), seq_len)
    cut = int(offsets[-1] - offsets[0] - lengths.sum())
    targets = np.flatnonzero(counted[offsets[0] : offsets[-1]]) + offsets[0]
    keep = np.searchsorted(targets, starts + 1) < np.searchsorted(targets, starts + lengths)
    masked = int(len(keep) - keep.sum())
    starts, lengths = starts[keep], lengths[keep]
    return PackedRows(starts, lengths, int(lengths.sum()), cut, masked)


def gather(
    tokens: NDArray[np.int32], counted: NDArray[np.bool_], rows: PackedRows, chosen: NDArray[np.int64], seq_len: int, pad: int
) -> dict[str, Tensor]:
    """The batch of the rows ``chosen`` [b]: input_ids, attention_mask, labels, each int64 [b, T], padded on the right."""
    shape = (len(chosen), seq_len)
    ids, mask, labels = np.full(shape, pad), np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED)
    for i, row in enumerate(chosen):
        start, length = rows.starts[row], rows.lengths[row]
        ids[i, :length] = tokens[start : start + length]
        mask[i, :length] = 1
        labels[i, :length] = np.where(counted[start : start + length], ids[i, :length], IGNORED)
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }
