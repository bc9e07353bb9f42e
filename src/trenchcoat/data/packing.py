"""Rows of a fixed length out of a flat stream of tokens: index arithmetic, no token is copied before its batch.

Shapes: n tokens of the stream, R rows, b rows of a batch, T tokens of a row.
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
    """Rows as pieces of a stream."""

    tokens: NDArray[np.int32]
    """The stream [n]."""
    counted: NDArray[np.bool_]
    """Whether a token counts in the labels [n]."""
    starts: NDArray[np.int64]
    """First token of each row [R]."""
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

    def batch(self, rows: NDArray[np.int64], pad: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels of ``rows`` [b], each int64 [b, T], padded on the right with ``pad``."""
        shape = (len(rows), self.seq_len)
        ids, mask, labels = np.full(shape, pad), np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED)
        for i, row in enumerate(rows):
            length = self.lengths[row]
            piece = slice(self.starts[row], self.starts[row] + length)
            ids[i, :length] = self.tokens[piece]
            mask[i, :length] = 1
            labels[i, :length] = np.where(self.counted[piece], self.tokens[piece], IGNORED)
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in named.items()}


def pack(
    tokens: NDArray[np.int32],
    counted: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    *,
    seq_len: int,
    contiguous: bool,
) -> PackedRows:
    """Rows of at most ``seq_len`` tokens out of the samples ``offsets[i] : offsets[i + 1]`` of the stream.

    Across samples, they are one stream, cut every ``seq_len`` tokens, and the remainder is left over.
    ``contiguous``: each sample is cut by itself, and its last piece may be short. A row without a counted token
    after its first is dropped: labels are shifted by one, so its loss would be a mean of nothing.
    """
    first, stop = int(offsets[0]), int(offsets[-1])
    if contiguous:
        pieces = -(-np.diff(offsets) // seq_len)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(offsets[:-1], pieces) + number * seq_len
        lengths = np.minimum(np.repeat(offsets[1:], pieces) - starts, seq_len)
    else:
        starts = np.arange(first, stop - seq_len + 1, seq_len)
        lengths = np.full(len(starts), seq_len)
    targets = np.flatnonzero(counted[first:stop]) + first
    keep = np.searchsorted(targets, starts + 1) < np.searchsorted(targets, starts + lengths)
    return PackedRows(
        tokens,
        counted,
        starts[keep],
        lengths[keep],
        seq_len,
        tokens_cut=stop - first - int(lengths.sum()),
        rows_masked=int((~keep).sum()),
    )
