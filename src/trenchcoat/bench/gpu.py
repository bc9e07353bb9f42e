"""Measuring on a GPU: medians of CUDA events, captured graphs, the device's ceilings, and rows of measured and wanted.

Everything also runs on a CPU (with the wall clock, and without capture), so that no code waits for a GPU to be tried.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

LONG_MEASUREMENT = 4.0
"""Seconds that the repeats of one piece of work may take together, beyond three of them."""


class Timer:
    """Median seconds of a piece of work on `device`, of up to `repeats` runs after one that does not count."""

    def __init__(self, repeats: int, device: str) -> None:
        self.repeats, self.device = repeats, device

    def __call__(self, work: Callable[[], object]) -> float:
        self._once(work)
        first = self._once(work)
        affordable = max(3, round(LONG_MEASUREMENT / max(first, 1e-6)))
        return statistics.median([first, *(self._once(work) for _ in range(min(self.repeats, affordable) - 1))])

    def _once(self, work: Callable[[], object]) -> float:
        if self.device == "cpu":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)


def captured(work: Callable[[], object], device: str) -> Callable[[], object]:
    """`work` as one CUDA graph, after two ordinary runs of it; on a CPU, which has no graphs, `work` itself.

    It must do the same at every run, with tensors at fixed addresses.
    """
    if device == "cpu":
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    """`work`, `times` times in a row."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


@dataclass(frozen=True)
class Ceilings:
    """What the device can do."""

    bytes_per_second: float
    operations_per_second: float

    @classmethod
    def measured(cls, timer: Timer, elements: int, side: int) -> Ceilings:
        """By a copy of `elements` bfloat16 numbers (read and write count) and a product of `side` x `side` matrices."""
        a = torch.empty(elements, dtype=torch.bfloat16, device=timer.device).normal_()
        b = torch.empty_like(a)
        bytes_s = 2.0 * a.nbytes / timer(partial(b.copy_, a))
        del a, b
        x, y = (torch.randn(side, side, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
        return cls(bytes_s, 2.0 * side**3 / timer(partial(torch.matmul, x, y)))

    def entry(self, taken: float, work: tuple[float, float]) -> dict[str, float]:
        """Seconds beside the least that (operations, bytes) could take here, and the share of the roofline reached."""
        least = max(work[0] / self.operations_per_second, work[1] / self.bytes_per_second)
        return {"seconds": taken, "operations": work[0], "bytes": work[1], "least": least, "share": least / taken}


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement, or that it ran out of memory; what it held is given back either way."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def free_memory(device: str, given: int | None = None) -> int:
    """Bytes that can still be allocated on a GPU, or those that are `given` in their place (a CPU needs that)."""
    if given is not None:
        return given
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


@dataclass(frozen=True)
class Target:
    """A figure to reach: at most `wanted`, or at least."""

    what: str
    wanted: float
    at_most: bool

    def judged(self, measured: float | None, why: str = "") -> dict[str, Any]:
        """A row of the table; `why` nothing was measured."""
        met = None
        if measured is not None:
            met = measured <= self.wanted if self.at_most else measured >= self.wanted
        return {**asdict(self), "measured": measured, "met": met, "why": why}


def most(what: str, wanted: float) -> Target:
    """`what` is at most `wanted`."""
    return Target(what, wanted, at_most=True)


def least(what: str, wanted: float) -> Target:
    """`what` is at least `wanted`."""
    return Target(what, wanted, at_most=False)


def judge(target: Target, found: dict[str, Any], name: str, value: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """The row of `target`, whose figure is `value` of the measurement `name`, where there is one."""
    row = found.get(name)
    if row is None:
        return target.judged(None, "not measured")
    if "out_of_memory" in row:
        return target.judged(None, "out of memory")
    return target.judged(value(row))


def targets_table(rows: list[dict[str, Any]]) -> list[str]:
    """Measured, wanted and met, a line each."""
    lines = [f"{'target':<68} {'measured':>9} {'wanted':>9}  met"]
    for row in rows:
        measured = "-" if row["measured"] is None else f"{row['measured']:.2f}"
        wanted = f"{'<=' if row['at_most'] else '>='} {row['wanted']:g}"
        met = row["why"] if row["met"] is None else "yes" if row["met"] else "NO"
        lines.append(f"{row['what']:<68} {measured:>9} {wanted:>9}  {met}")
    return lines
