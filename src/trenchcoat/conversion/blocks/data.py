"""The rows of one pass through the blocks, and batches of hidden states instead of tokens.

A *pass* is a range of optimizer steps. Its rows are, in this order: the rows for the initial values (in the first
pass), the validation rows (if the pass evaluates), and the training rows of this process's micro-batches in the order
of first use. A row repeated in another epoch is stored once. Rows are always computed in the batch (*group*) in which
the joint run computes them first, so that the results are bit-identical.

Shapes: N rows of the pass, b rows of a micro-batch, T tokens, d entries of a hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trenchcoat.config import StageConfig
from trenchcoat.conversion.blocks.hidden import HiddenStates
from trenchcoat.data.batches import Batch, Batches
from trenchcoat.runtime import distributed
from trenchcoat.training.schedules import evaluation_batches, step_batches, training_length

ROWS = "rows"
"""Key, in a batch of hidden states, of the rows' indices in the pass [b]."""


@dataclass(frozen=True)
class Span:
    """A pass as optimizer steps [``first``, ``until``)."""

    number: int
    first: int
    until: int

    @property
    def folder(self) -> str:
        """Name of the folder of its hidden states."""
        return f"pass-{self.first:08d}-{self.until:08d}"


def spans(total_steps: int, steps_a_pass: int) -> list[Span]:
    """All passes of a stage."""
    starts = range(0, total_steps, steps_a_pass)
    return [Span(number, first, min(first + steps_a_pass, total_steps)) for number, first in enumerate(starts)]


class PassRows:
    """The rows of one pass on this process."""

    def __init__(
        self,
        span: Span,
        text: Batches,
        cfg: StageConfig,
        *,
        totals: Sequence[int],
        start: Batch | None,
        of_all: bool = False,
    ) -> None:
        """``totals``: optimizer steps of every block; ``start``: the batch for the initial values; ``of_all``: include
        the rows of other processes' micro-batches, in the same order on every process."""
        self.span = span
        self.groups: list[list[int]] = []
        """Rows that are computed together; a row may be in several groups."""
        self.start: list[int] = []
        self.train: dict[int, list[int]] = {}
        """Index of a micro-batch of this process -> its rows."""
        self.validation: dict[int, list[int]] = {}
        self._ids: list[Tensor] = []
        self._real: list[Tensor] = []
        self._places: dict[Any, int] = {}
        if start is not None:
            self.start = self._add(start, [("start", place) for place in range(len(start["input_ids"]))])
        if self._evaluates(cfg, totals):
            for index, own in _shared(range(evaluation_batches(cfg, text.validation_batches())), of_all):
                batch = text.validation_batch(index)
                rows = self._add(batch, [("validation", (index, place)) for place in range(len(batch["input_ids"]))])
                if own:
                    self.validation[index] = rows
        micro_batches, _ = training_length(cfg, len(text))
        for step in range(span.first, span.until):
            for index, own in _shared(step_batches(cfg, step, micro_batches), of_all):
                self._add_training(index, text, own=own)
        if not self.train:  # more processes than micro-batches per step: run something so that collectives match
            self._add_training(span.first * cfg.accumulation, text, own=True)
        self.ids_NT = torch.stack(self._ids)
        self.real_NT = torch.stack(self._real)
        self._ids, self._real = [], []

    def _add_training(self, index: int, text: Batches, *, own: bool) -> None:
        rows = self._add(text.train_batch(index), [("train", name) for name in text.train_rows(index)])
        if own:
            self.train[index] = rows

    def _evaluates(self, cfg: StageConfig, totals: Sequence[int]) -> bool:
        steps = range(self.span.first + 1, self.span.until + 1)
        ends = any(total in steps for total in totals)
        return self.span.first == 0 or ends or any(step % cfg.eval_every == 0 for step in steps)

    def _add(self, batch: Batch, names: Sequence[tuple[str, Any]]) -> list[int]:
        """Indices of the rows of a micro-batch; new ones are added."""
        rows = []
        for place, name in enumerate(names):
            if name not in self._places:
                self._places[name] = len(self._ids)
                self._ids.append(batch["input_ids"][place].to(torch.int32))
                self._real.append(batch["attention_mask"][place].bool())
            rows.append(self._places[name])
        self.groups.append(rows)
        return rows

    @property
    def rows(self) -> int:
        """N"""
        return len(self.ids_NT)

    @property
    def tokens(self) -> int:
        """T"""
        return int(self.ids_NT.shape[1])

    def text(self, rows: Sequence[int]) -> Batch:
        """Tokens and padding of ``rows``, [b, T]."""
        where = torch.tensor(rows)
        return {"input_ids": self.ids_NT[where].long(), "attention_mask": self.real_NT[where].long(), ROWS: where}

    def hidden(self, rows: Sequence[int], states: HiddenStates) -> Batch:
        """Hidden states and padding of ``rows``."""
        where = torch.tensor(rows)
        padding = self.real_NT[where].long()
        return {"inputs_embeds": states.read(rows), "attention_mask": padding, ROWS: where}

    def groups_missing(self, states: HiddenStates, among: Sequence[list[int]] | None = None) -> list[list[int]]:
        """Groups (``among`` those given) with a row that ``states`` should have and has not."""
        missing = set(states.missing())
        return [rows for rows in (self.groups if among is None else among) if not missing.isdisjoint(rows)]


class TextOrder:
    """Micro-batch counts, seed and fingerprint of ``text``, for batches of its hidden states."""

    def __init__(self, text: Batches) -> None:
        self.text, self.seed, self.fingerprint = text, text.seed, text.fingerprint

    def __len__(self) -> int:
        """Micro-batches of one epoch."""
        return len(self.text)

    def validation_batches(self) -> int:
        """Validation micro-batches."""
        return self.text.validation_batches()


class HiddenBatches(TextOrder):
    """Hidden states as the data of ``fit``; the next batch is prefetched in the background."""

    def __init__(self, text: Batches, whole: PassRows, states: HiddenStates, *, pin: bool) -> None:
        super().__init__(text)
        self._pass, self._states, self._pin = whole, states, pin
        self._next = {False: dict(_following(whole.train)), True: dict(_following(whole.validation))}
        self._thread = ThreadPoolExecutor(1, "trenchcoat-hidden")
        self._ahead: dict[tuple[bool, int], Future[Batch]] = {}

    def train_batch(self, index: int) -> Batch:
        """Micro-batch ``index``; if it belongs to another process, any one (run only so that collectives match)."""
        return self._get(False, index if index in self._pass.train else next(iter(self._pass.train)))

    def validation_batch(self, index: int) -> Batch:
        """Validation micro-batch ``index``; if it belongs to another process, any one."""
        known = self._pass.validation
        if not known:
            return self.train_batch(next(iter(self._pass.train)))
        return self._get(True, index if index in known else next(iter(known)))

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _get(self, held_out: bool, index: int) -> Batch:
        wanted = (held_out, index)
        job = self._ahead.pop(wanted, None) or self._thread.submit(self._make, wanted)
        following = self._next[held_out].get(index)
        if following is not None and (held_out, following) not in self._ahead:
            self._ahead[held_out, following] = self._thread.submit(self._make, (held_out, following))
        return job.result()

    def _make(self, wanted: tuple[bool, int]) -> Batch:
        held_out, index = wanted
        rows = (self._pass.validation if held_out else self._pass.train)[index]
        batch = self._pass.hidden(rows, self._states)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch


def _shared(indices: Sequence[int], of_all: bool) -> Iterator[tuple[int, bool]]:
    """(index, whether it belongs to this process); those of other processes only with ``of_all``."""
    for place, index in enumerate(indices):
        own = place % distributed.size() == distributed.rank()
        if own or of_all:
            yield index, own


def _following(batches: dict[int, list[int]]) -> Iterator[tuple[int, int]]:
    order = list(batches)
    return zip(order, order[1:], strict=False)
