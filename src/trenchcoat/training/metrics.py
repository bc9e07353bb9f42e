"""Numbers of an optimizer step or an evaluation: summed over micro-batches and processes, and how fast it went."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping

import torch

from trenchcoat.models.flops import device_peak
from trenchcoat.runtime import distributed
from trenchcoat.training.objectives import Batch, Metrics

GIB = 1 << 30


class MetricSums:
    """MetricSums of metrics over micro-batches, plain and weighted by their tokens."""

    def __init__(self) -> None:
        self._plain: dict[str, float] = {}
        self._weighted: dict[str, float] = {}
        self.count, self.tokens, self.stop = 0.0, 0.0, False
        self.suspect: Batch | None = None
        """The micro-batch whose metrics are not finite, else the last one."""

    def add(self, metrics: Metrics, batch: Batch, *, counts: bool) -> None:
        """One micro-batch more; with ``counts`` false only the names of its metrics matter."""
        tokens = metrics.get("tokens", 1.0)
        for name, value in metrics.items():
            if name != "tokens":
                self._plain[name] = self._plain.get(name, 0.0) + (value if counts else 0.0)
                self._weighted[name] = self._weighted.get(name, 0.0) + (tokens * value if counts else 0.0)
        if counts:
            self.count, self.tokens = self.count + 1.0, self.tokens + tokens
        if self.suspect is None or self.finite():
            self.suspect = batch

    def reduce(self, stop: bool) -> None:
        """Make them those of all processes; ``stop`` (somebody was asked to) becomes everybody's."""
        everything = {f"plain/{name}": value for name, value in self._plain.items()}
        everything |= {f"weighted/{name}": value for name, value in self._weighted.items()}
        everything |= {"count": self.count, "tokens": self.tokens, "stop": float(stop)}
        total = distributed.sum_metrics(everything)
        self._plain = {name: total[f"plain/{name}"] for name in self._plain}
        self._weighted = {name: total[f"weighted/{name}"] for name in self._weighted}
        self.count, self.tokens = total["count"], total["tokens"]
        self.stop = distributed.size() > 1 and total["stop"] > 0

    def finite(self) -> bool:
        """Whether every sum is a finite number."""
        return not self.broken()

    def broken(self) -> list[str]:
        """Names of the sums that are not."""
        return [name for name, value in self._plain.items() if not math.isfinite(value)]

    def means(self, *, weighted: bool) -> dict[str, float]:
        """Means over micro-batches, or over tokens where there are any."""
        if weighted and self.tokens > 0:
            return {name: value / self.tokens for name, value in self._weighted.items()}
        return {name: value / self.count for name, value in self._plain.items()}


class Meter:
    """Speed and memory of a step, for the log: ``speed/tokens_per_second`` (of all processes together),
    ``speed/mfu`` where the device's peak and ``flops_per_token`` are known, ``speed/memory_gib`` (the most that any
    process has held: of its GPU, else of the host)."""

    def __init__(self, flops_per_token: float | None) -> None:
        self.flops_per_token = flops_per_token

    def read(self, device: torch.device, tokens: int, seconds: float) -> Mapping[str, float]:
        """Numbers of a step that took ``seconds`` for ``tokens`` of all processes; a collective."""
        rate = tokens / max(seconds, 1e-9)
        found = {"speed/tokens_per_second": round(rate, 1), "speed/memory_gib": round(self._memory(device), 3)}
        peak = device_peak(torch.cuda.get_device_name(device), torch.bfloat16) if device.type == "cuda" else None
        if peak is not None and self.flops_per_token is not None:
            found["speed/mfu"] = round(rate * self.flops_per_token / (peak * distributed.size()), 4)
        return found

    @staticmethod
    def _memory(device: torch.device) -> float:
        if device.type == "cuda":
            held = torch.cuda.max_memory_allocated(device)
        else:
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return distributed.largest(held / GIB)
