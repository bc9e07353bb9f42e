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


def seconds(work: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, Clock]:
    """Time each piece of work, in turns so that a busy machine slows all alike; the first turn does not count."""
    taken: dict[str, list[Clock]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, call in work.items():
            wait(device)
            wall, processor = time.perf_counter(), time.process_time()
            call()
            wait(device)
            if turn:
                taken[name].append(Clock(time.perf_counter() - wall, time.process_time() - processor))
    median = statistics.median
    return {
        name: Clock(median(c.wall for c in all_), median(c.processor for c in all_)) for name, all_ in taken.items()
    }


def wait(device: str) -> None:
    """Let the device finish what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
