"""Timing several pieces of work fairly on a machine that may be busy with other things."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clock:
    """Median seconds of one piece of work: wall clock, and the processor's own (which other programs disturb less)."""

    wall: float
    processor: float


LONG_ENOUGH = 0.3
"""Seconds: shorter work is called several times in a row, and its mean counts."""


def seconds(work: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, Clock]:
    """Time each piece of work, in turns so that a busy machine slows all alike; the first turn does not count."""
    taken: dict[str, list[Clock]] = {name: [] for name in work}
    calls = dict.fromkeys(work, 1)
    for turn in range(repeats + 1):
        for name, call in work.items():
            if turn:
                taken[name].append(_time(call, calls[name], device))
                continue
            first = _time(call, 1, device).wall
            if first < LONG_ENOUGH:
                calls[name] = max(1, round(LONG_ENOUGH / max(1e-6, _time(call, 1, device).wall)))
    median = statistics.median
    return {
        name: Clock(median(c.wall for c in all_), median(c.processor for c in all_)) for name, all_ in taken.items()
    }


def _time(call: Callable[[], None], calls: int, device: str) -> Clock:
    wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    wait(device)
    return Clock((time.perf_counter() - wall) / calls, (time.process_time() - processor) / calls)


def wait(device: str) -> None:
    """Let the device finish what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
