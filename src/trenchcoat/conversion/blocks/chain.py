"""A chain of processes: each receives micro-batches of hidden states from the one before it and sends to the one after.

    chain = Chain(hidden, dtype)
    batch = chain.receive(item)                 the next micro-batch, which must be ``item``
    chain.send(item, hidden_bTd, padding_bT)    returns before it has arrived
    chain.close(END)                            every process, once; nothing is left in transit afterwards

Data only moves from the first process to the last, through the host's group (gloo), so CPUs and GPUs behave the same. A
message is a header of five numbers (its type, which micro-batch, its rows and tokens), followed, for a micro-batch, by
its bytes: hidden states [b, T, d], then the padding [b, T]. A thread receives ahead of time and sends are asynchronous,
each by at most ``QUEUED`` micro-batches, so a process holds at most 2 ``QUEUED`` of them plus the current one. Waiting
for a neighbour has no timeout. A stop request or a failure goes to the first process through the job's store, and from
there along the chain in place of a micro-batch: all processes stop before the same micro-batch.

Shapes: b rows of a micro-batch, T tokens, d entries of a hidden state.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trenchcoat.runtime import distributed

QUEUED = 2
"""Maximum micro-batches in a process's receive queue, and maximum sends in flight to the next process."""
DATA, END, STOP, FAILED = range(4)
"""Message types: a micro-batch; the end of the data; a requested stop; the end because of a failure."""
START, VALIDATION, TRAIN = range(3)
"""Kinds of micro-batches: rows for the initial values, validation rows, training rows."""

_ROUNDS = count()


class BatchKey(NamedTuple):
    """Identifies a micro-batch by its kind and its number within that kind."""

    kind: int
    number: int


class Arrived(NamedTuple):
    """A micro-batch on the host: hidden states [b, T, d] and padding [b, T] (int64, 1 for tokens)."""

    item: BatchKey
    hidden_bTd: Tensor
    padding_bT: Tensor


class Closed(Exception):
    """No more data will arrive: ``code`` is ``END``, ``STOP`` or ``FAILED``."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(("data", "the end", "a stop", "a failure elsewhere")[code])


class Chain:
    """This process's end of the chain; ``hidden`` is d, ``pin`` receives into pinned memory for GPU copies."""

    def __init__(self, hidden: int, dtype: torch.dtype, *, pin: bool = False) -> None:
        self.rank, self.size = distributed.rank(), distributed.size()
        self.hidden, self.dtype, self.pin = hidden, dtype, pin
        self.first, self.last = self.rank == 0, self.rank == self.size - 1
        self._name = f"chain-{next(_ROUNDS)}"
        self._sending: deque[Sequence[tuple[dist.Work, Tensor]]] = deque()
        self._arrived: queue.Queue[Arrived | int | RuntimeError] = queue.Queue(QUEUED - 1)
        self._code: int | None = None
        self._over = threading.Event()
        if not self.first:
            threading.Thread(target=self._listen, daemon=True, name="trenchcoat-chain").start()

    # Along the chain

    def send(self, item: BatchKey, hidden_bTd: Tensor, padding_bT: Tensor) -> None:
        """Send a micro-batch to the next process; blocks while ``QUEUED`` sends are in flight. ``RuntimeError`` if the
        next process is gone."""
        rows, tokens, _ = hidden_bTd.shape
        states = hidden_bTd.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).flatten()
        payload = torch.cat([states, padding_bT.to("cpu", torch.uint8).flatten()])
        self._post([DATA, *item, rows, tokens], payload)

    def receive(self, item: BatchKey) -> Arrived:
        """The next micro-batch from the previous process; raises ``Closed`` when there is none, ``RuntimeError`` when
        that process is gone or sends a different micro-batch."""
        found = self._next()
        if isinstance(found, int):
            raise Closed(found)
        if found.item != item:
            raise RuntimeError(f"process {self.rank} expects micro-batch {item} and received {found.item}")
        return found

    def close(self, code: int) -> None:
        """Tell the next process that no more data follows, and drain what the previous one still sends.

        ``code`` is ``END`` (the code of the previous process is then forwarded), or why this process ends early.
        """
        if code != END and not self.last:
            self._post([code, 0, 0, 0, 0])
        while not self.first and self._code is None:
            self._next()
        if code == END and not self.last:
            self._post([END if self._code is None else self._code, 0, 0, 0, 0])
        while self._sending:
            self._wait_for_oldest()

    def abandon(self) -> None:
        """Stop the thread, for a process that exits without :meth:`close`."""
        self._over.set()

    def _next(self) -> Arrived | int:
        if self._code is not None:
            return self._code
        found = self._arrived.get()
        if isinstance(found, RuntimeError):
            raise found
        if isinstance(found, int):
            self._code = found
        return found

    def _post(self, head: list[int], payload: Tensor | None = None) -> None:
        while len(self._sending) >= QUEUED:
            self._wait_for_oldest()
        parts = [torch.tensor(head, dtype=torch.int64), *([] if payload is None else [payload])]
        self._sending.append([(self._started(part), part) for part in parts])

    def _started(self, part: Tensor) -> dist.Work:
        work = dist.isend(part, self.rank + 1)
        assert work is not None
        return work

    def _wait_for_oldest(self) -> None:
        for work, _ in self._sending.popleft():
            work.wait()

    def _listen(self) -> None:
        """Receive until the chain is closed; runs in a background thread."""
        try:
            while True:
                found = self._read()
                self._put(found)
                if isinstance(found, int) or self._over.is_set():
                    return
        except RuntimeError as error:
            self._put(error)

    def _put(self, found: Arrived | int | RuntimeError) -> None:
        while not self._over.is_set():
            try:
                self._arrived.put(found, timeout=1.0)
            except queue.Full:
                continue
            return

    def _read(self) -> Arrived | int:
        head = torch.empty(5, dtype=torch.int64)
        dist.recv(head, self.rank - 1)
        code, kind, number, rows, tokens = head.tolist()
        if code != DATA:
            return int(code)
        width = self.hidden * self.dtype.itemsize
        payload = torch.empty(rows * tokens * (width + 1), dtype=torch.uint8, pin_memory=self.pin)
        dist.recv(payload, self.rank - 1)
        states, padding = payload.split([rows * tokens * width, rows * tokens])
        hidden_bTd = states.view(self.dtype).view(rows, tokens, self.hidden)
        return Arrived(BatchKey(kind, number), hidden_bTd, padding.view(rows, tokens).long())

    # Through the job's store

    def ask(self, code: int) -> None:
        """Ask the first process to close the chain with ``STOP`` or ``FAILED``."""
        distributed.leave_note(f"{self._name}/halt", str(code))

    def asked(self) -> int | None:
        """The code that a process has asked for, read from the job's store; None if there is none."""
        found = distributed.look_for_notes(f"{self._name}/halt")
        return None if found is None else int(found[0])

    def done(self) -> None:
        """Report that this process needs no more data for its own training."""
        distributed.leave_note(f"{self._name}/done-{self.rank}", "")

    def all_done(self) -> bool:
        """Whether all processes have reported this."""
        return distributed.look_for_notes(*(f"{self._name}/done-{rank}" for rank in range(self.size))) is not None
