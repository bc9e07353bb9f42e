"""Batches by index: what the training loop asks of the data.

Shapes: b rows of a batch, T tokens of a row (``data.seq_len``). A batch is ``input_ids``, ``attention_mask`` (0 at
padding) and ``labels`` (-100 where no loss is taken, else equal to ``input_ids``; not shifted), each int64 [b, T].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trenchcoat.data.packing import PackedRows

Batch = dict[str, Tensor]
Part = Literal["train", "validation"]


class Batches:
    """Batches by index, in an order that only the seed decides.

    Training rows come from an endless stream: one permutation of all rows after another, each seeded by
    (seed, epoch). Batch ``index`` is rows ``index * b`` to ``(index + 1) * b`` of that stream, so every batch is full
    and resuming needs nothing but the index.
    """

    def __init__(
        self,
        parts: dict[Part, PackedRows],
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
        of the stream), rows_masked (dropped: no label counts); with ``data.select``, train/samples_selected."""
        return dict(self._counts)

    def __len__(self) -> int:
        """Micro-batches of one epoch."""
        return math.ceil(self.rows("train") / self.batch_size)

    def rows(self, split: Part) -> int:
        """Rows of ``train`` or ``validation``."""
        return len(self._parts[split])

    def train_batch(self, index: int) -> Batch:
        """Training batch ``index`` >= 0, over as many epochs as it takes; [b, T]."""
        rows = self.rows("train")
        chosen = [
            self._order(position // rows)[position % rows]
            for position in range(index * self.batch_size, (index + 1) * self.batch_size)
        ]
        return self._parts["train"].batch(np.array(chosen), self._pad)

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        """The validation rows in their own order, at most ``limit`` batches; the last one may have fewer rows."""
        rows = np.arange(self.rows("validation"))
        for start in itertools.islice(range(0, len(rows), self.batch_size), limit):
            yield self._parts["validation"].batch(rows[start : start + self.batch_size], self._pad)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.rows("train"))
        return self._orders[epoch]
