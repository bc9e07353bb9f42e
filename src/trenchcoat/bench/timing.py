"""Fair timing on a machine that may be busy, and on a GPU; also measures the device's ceilings.

Everything also runs on a CPU (with the wall clock, without capture), so that every line can be tested there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trenchcoat.runtime.memory import live_tensor_memory

LONG_ENOUGH = 0.3
"""Seconds: shorter work is called several times in a row and averaged."""


def seconds(work: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Median seconds of each function by wall clock (``wall``) and by CPU time (``processor``), which other programs
    disturb less.

    The functions alternate, so that a busy machine slows all of them equally; the first turn is discarded.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    calls = dict.fromkeys(work, 1)
    for turn in range(repeats + 1):
        for name, call in work.items():
            if turn:
                taken[name].append(_time(call, calls[name], device))
                continue
            first = _time(call, 1, device)[0]
            if first < LONG_ENOUGH:
                calls[name] = max(1, round(LONG_ENOUGH / max(1e-6, _time(call, 1, device)[0])))
    return {
        name: {"wall": statistics.median(wall), "processor": statistics.median(processor)}
        for name, (wall, processor) in ((name, zip(*times, strict=True)) for name, times in taken.items())
    }


def _time(call: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - processor) / calls


def wait(device: str) -> None:
    """Wait for the device to finish."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_bytes(work: Callable[[], object], learned: Iterable[Tensor]) -> int:
    """Peak live bytes of `work`'s second run, beyond parameters and the gradients of the `learned`, which it frees."""
    work()
    with live_tensor_memory() as memory:
        work()
    for parameter in learned:
        parameter.grad = None
    return memory.peak


LONG_MEASUREMENT = 4.0
"""Total seconds for the repeats of one function, beyond the first three."""


class Timer:
    """Median seconds of a function on `device` over up to `repeats` runs, after one that is discarded."""

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
    """`work` as one CUDA graph, after two ordinary runs of it; on a CPU, `work` itself.

    It must do the same in every run, with tensors at fixed addresses.
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
        """All of them."""
        for _ in range(times):
            work()

    return run


@dataclass(frozen=True)
class Ceilings:
    """The device's peak bandwidth and FLOP/s, as measured."""

    bytes_per_second: float
    operations_per_second: float

    @classmethod
    def measured(cls, timer: Timer, elements: int, side: int) -> Ceilings:
        """Measured by a copy of `elements` bfloat16 elements (counting read and write) and a product of `side` x `side`
        matrices."""
        a = torch.empty(elements, dtype=torch.bfloat16, device=timer.device).normal_()
        b = torch.empty_like(a)
        bytes_s = 2.0 * a.nbytes / timer(partial(b.copy_, a))
        del a, b
        x, y = (torch.randn(side, side, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
        return cls(bytes_s, 2.0 * side**3 / timer(partial(torch.matmul, x, y)))

    def entry(self, taken: float, work: tuple[float, float]) -> dict[str, float]:
        """Seconds, the minimum time for (operations, bytes) on this device, and the share of the roofline reached."""
        least = max(work[0] / self.operations_per_second, work[1] / self.bytes_per_second)
        return {"seconds": taken, "operations": work[0], "bytes": work[1], "least": least, "share": least / taken}


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement, or that it ran out of memory; its memory is released either way. After any other
    error nothing is: a broken device would raise another error in its place."""
    try:
        found = work()
    except torch.cuda.OutOfMemoryError as error:
        found = {"out_of_memory": str(error).splitlines()[0]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found
