"""Independent tiles side by side: on a CPU, one tile a thread rather than every small operation split over all threads.

Splitting an operation of some 100 microseconds costs as much as it saves when the other threads have to be woken, as
they do under `OMP_WAIT_POLICY=PASSIVE`; and spinning threads starve whatever else the machine is doing. Torch lets go
of Python's lock inside its operations, so threads over whole tiles avoid both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import Generic, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from trenchcoat.ops.tiles import Scratch

T = TypeVar("T")
R = TypeVar("R")

MOST = 8
"""Tiles at once; beyond, Python's lock is in the way, and the remaining threads serve the operations of each tile."""
WORTH_IT = 1024
"""Query rows (heads x tokens) below which one thread is quicker than starting another."""
LONG_OPERATIONS = 3
"""`least` where nearly all time goes into matrix products and softmax: two threads share those as well as the tiles,
and need not wait for Python's lock (measured: 12 % quicker at 4,096 tokens, 40 % at 1,024)."""


def crew_size(rows: int, device: torch.device, *, least: int = 2) -> int:
    """How many tiles to run at once, for `rows` query rows in all; 1 where fewer than `least` threads are to be had.

    1 also under a dispatch mode that does not say it can follow (`follows_threads`).
    """
    modes = _get_current_dispatch_mode_stack()
    if device.type != "cpu" or rows < WORTH_IT or not all(getattr(mode, "follows_threads", False) for mode in modes):
        return 1
    threads = min(torch.get_num_threads(), MOST)
    return threads if threads >= least else 1


def run(
    tasks: Sequence[T],
    work: Callable[[T, Scratch], R],
    *,
    crew: int,
    device: torch.device,
    dtype: torch.dtype,
    purpose: str,
) -> list[R]:
    """`work(task, scratch)` for every task, results in order, `crew` of them at once; they must not share memory.

    `purpose` names the scratch. Nothing is recorded for autograd.
    """
    return _Crew(tasks, work, lambda: Scratch(device, dtype, purpose)).run(min(crew, max(1, len(tasks))))


@cache
def _waiting() -> ThreadPoolExecutor:
    """Threads that wait for the next call: starting one each time costs as much as a small tile."""
    return ThreadPoolExecutor(MOST - 1, thread_name_prefix="trenchcoat-tiles")


os.register_at_fork(after_in_child=_waiting.cache_clear)  # threads do not survive a fork


class _Crew(Generic[T, R]):
    def __init__(self, tasks: Sequence[T], work: Callable[[T, Scratch], R], scratch: Callable[[], Scratch]) -> None:
        self.tasks, self.work, self.scratch = tasks, work, scratch
        self.results: dict[int, R] = {}
        self.lock, self.next = threading.Lock(), 0
        self.modes = _get_current_dispatch_mode_stack()
        self.inference = torch.is_inference_mode_enabled()

    def run(self, size: int) -> list[R]:
        """The calling thread is one of the crew; the first failure of any is raised here."""
        threads = torch.get_num_threads()
        share = max(1, threads // size)
        others = [_waiting().submit(self._join_in, share) for _ in range(size - 1)]
        try:
            if others:
                torch.set_num_threads(share)
            self._take_turns()
        finally:
            self._call_off()
            for other in others:
                other.exception()
            if others:
                torch.set_num_threads(threads)
        for other in others:
            other.result()
        return [self.results[index] for index in range(len(self.tasks))]

    def _join_in(self, share: int) -> None:
        torch.set_num_threads(share)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            for mode in self.modes:
                stack.enter_context(mode)
            try:
                self._take_turns()
            finally:
                self._call_off()

    def _call_off(self) -> None:
        """No further task is begun (there is none left, or one failed)."""
        with self.lock:
            self.next = len(self.tasks)

    @torch.no_grad()
    def _take_turns(self) -> None:
        scratch = self.scratch()
        while True:
            with self.lock:
                index, self.next = self.next, self.next + 1
            if index >= len(self.tasks):
                scratch.close()
                return
            self.results[index] = self.work(self.tasks[index], scratch)
