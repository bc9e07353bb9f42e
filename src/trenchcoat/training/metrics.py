"""Metrics of an optimizer step or an evaluation, summed over micro-batches and processes; speed and memory."""

from __future__ import annotations

import math
import resource
from typing import TYPE_CHECKING

import torch

from trenchcoat.config.units import GIB
from trenchcoat.runtime import distributed
from trenchcoat.runtime.devices import device_peak
from trenchcoat.training.objectives import Metrics

if TYPE_CHECKING:
    from trenchcoat.data.batches import Batch


class MetricSums:
    """Sums of metrics over micro-batches, plain and weighted by their tokens."""

    def __init__(self) -> None:
        self._sums = {"count": 0.0, "tokens": 0.0, "stop": 0.0}
        self.suspect: Batch | None = None
        """The micro-batch whose metrics are not finite, else the last one."""

    def add(self, metrics: Metrics, batch: Batch, *, counts: bool) -> None:
        """Add a micro-batch; with ``counts`` false only the names of its metrics are registered."""
        tokens = metrics.get("tokens", 1.0)
        new = {"count": 1.0, "tokens": tokens}
        for name, value in metrics.items():
            if name != "tokens":
                new |= {f"plain/{name}": value, f"weighted/{name}": tokens * value}
        for name, value in new.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value if counts else 0.0)
        if self.suspect is None or not self.broken():
            self.suspect = batch

    def reduce(self, stop: bool) -> None:
        """Sum over all processes; a ``stop`` request on any process is shared with all."""
        self._sums = distributed.sum_metrics({**self._sums, "stop": float(stop)})

    @property
    def tokens(self) -> float:
        """Tokens the means are over."""
        return self._sums["tokens"]

    @property
    def stop(self) -> bool:
        """Whether any of several processes was asked to stop."""
        return distributed.size() > 1 and self._sums["stop"] > 0

    def broken(self) -> list[str]:
        """Names of the metrics whose sum is not a finite number."""
        return [name for name, value in self._of("plain/").items() if not math.isfinite(value)]

    def means(self, *, weighted: bool) -> dict[str, float]:
        """Means over micro-batches, or over tokens where there are any."""
        if weighted and self.tokens > 0:
            return {name: value / self.tokens for name, value in self._of("weighted/").items()}
        return {name: value / self._sums["count"] for name, value in self._of("plain/").items()}

    def _of(self, kind: str) -> dict[str, float]:
        return {name.removeprefix(kind): value for name, value in self._sums.items() if name.startswith(kind)}


def speed(device: torch.device, tokens: int, seconds: float, flops_per_token: float | None) -> dict[str, float]:
    """Speed and memory of a step that took ``seconds`` for ``tokens`` over all processes, for the log; a collective.

    ``speed/tokens_per_second`` is over all processes, ``speed/mfu`` is given when the device's peak and
    ``flops_per_token`` are known, ``speed/memory_gib`` is the peak memory of any process (on its GPU, else on the
    host).
    """
    on_gpu = device.type == "cuda"
    rate = tokens / max(seconds, 1e-9)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ours = torch.cuda.max_memory_allocated(device) if on_gpu else host
    found = {
        "speed/tokens_per_second": round(rate, 1),
        "speed/memory_gib": round(distributed.largest(ours / GIB), 3),
    }
    peak = device_peak(torch.cuda.get_device_name(device)) if on_gpu else None
    if peak is not None and flops_per_token is not None:
        found["speed/mfu"] = round(rate * flops_per_token / (peak * distributed.size()), 4)
    return found
