"""Batches by index: the interface between the training loop and the data.

Shapes: b rows of a batch, T tokens of a row (``data.seq_len``). A batch is ``input_ids``, ``attention_mask`` (0 at
padding) and ``labels`` (-100 where no loss is taken, else equal to ``input_ids``; not shifted), each int64 [b, T].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trenchcoat.data.packing import PackedRows
from trenchcoat.models.embedded import Split

Batch = dict[str, Tensor]
"""Tensors of one micro-batch by name; for a few layers alone, ``inputs_embeds`` [b, T, d] in place of ``input_ids``."""


class Batches:
    """Batches by index, in an order that depends only on the seed.

    Training rows come from an endless stream: one permutation of all rows after another, each seeded by
    (seed, epoch). Batch ``index`` is rows ``index * b`` to ``(index + 1) * b`` of that stream, so every batch is full
    and resuming needs nothing but the index.
    """

    def __init__(
        self,
        parts: dict[Split, PackedRows],
        *,
        batch_size: int,
        seed: int,
        pad: int,
        fingerprint: str,
        source_counts: dict[str, int],
    ) -> None:
        self._parts = parts
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.batch_size, self.seed, self._pad = batch_size, seed, pad
        self.fingerprint = fingerprint
        """Hash of the tokens and their division into rows (not of batch size and seed)."""
        self._counts = dict(source_counts)
        for name, rows in parts.items():
            self._counts |= {
                f"{name}/rows": len(rows),
                f"{name}/tokens": int(rows.lengths.sum()),
                f"{name}/tokens_cut": rows.tokens_cut,
                f"{name}/rows_masked": rows.rows_masked,
            }

    @property
    def counts(self) -> dict[str, int]:
        """rows_read, rows_skipped and skipped/<reason>, then per part: rows, tokens, tokens_cut (left over at the end
        of the stream), rows_masked (dropped: no label counts); with ``data.select``, train/rows_selected."""
        return dict(self._counts)

    def __len__(self) -> int:
        """Micro-batches of one epoch."""
        return math.ceil(self.rows("train") / self.batch_size)

    def rows(self, split: Split) -> int:
        """Rows of ``train`` or ``validation``."""
        return len(self._parts[split])

    def train_batch(self, index: int) -> Batch:
        """Training batch ``index`` >= 0, over as many epochs as it takes; [b, T]."""
        return self._parts["train"].batch(np.array(self.train_rows(index)), self._pad)

    def rows_batch(self, split: Split, rows: Sequence[int]) -> Batch:
        """The given rows of ``train`` or ``validation``, by their IDs; [b, T]."""
        return self._parts[split].batch(np.array(rows), self._pad)

    def train_rows(self, index: int) -> list[int]:
        """IDs of the rows of training batch ``index`` [b]: the same row has the same ID in every epoch."""
        rows = self.rows("train")
        places = range(index * self.batch_size, (index + 1) * self.batch_size)
        return [int(self._order(place // rows)[place % rows]) for place in places]

    def validation_batches(self) -> int:
        """Validation batches."""
        return math.ceil(self.rows("validation") / self.batch_size)

    def validation_batch(self, index: int) -> Batch:
        """Validation batch ``index``, in the rows' own order; the last one may have fewer rows."""
        rows = np.arange(self.rows("validation"))[index * self.batch_size : (index + 1) * self.batch_size]
        return self._parts["validation"].batch(rows, self._pad)

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        """The validation batches, at most ``limit``."""
        number = self.validation_batches()
        return (self.validation_batch(index) for index in range(number if limit is None else min(number, limit)))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.rows("train"))
        return self._orders[epoch]
