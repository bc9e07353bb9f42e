"""Counters of the server in Prometheus' text format."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from trenchcoat.serving.engine import Job

BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of the histograms, in seconds."""


class Histogram:
    """Seconds, counted in buckets."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[next((place for place, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += 1
        self.total += seconds

    @property
    def mean(self) -> float:
        """Mean seconds; 0 if nothing was counted."""
        return self.total / max(sum(self.counts), 1)

    def lines(self, name: str) -> list[str]:
        """In text format: cumulative counts."""
        made, below = [f"# TYPE {name} histogram"], 0
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], self.counts, strict=True):
            below += count
            made.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*made, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    """What the server has done. Only the event loop's thread changes it."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = defaultdict(int)
        """By route and status; 499: the client was gone."""
        self.prompt_tokens = self.written_tokens = self.state_bytes = 0
        self.waiting = self.running = 0
        self.queue_seconds, self.first_token_seconds, self.run_seconds = Histogram(), Histogram(), Histogram()

    def finished(self, job: Job, now: float) -> None:
        """Count a job that the model has worked on; `now` is monotonic time."""
        if job.started is None:
            return
        self.prompt_tokens += job.prompt_tokens
        self.written_tokens += job.written
        self.state_bytes = job.state_bytes or self.state_bytes
        self.queue_seconds.add(job.started - job.queued)
        self.run_seconds.add(now - job.started)
        if job.first_token is not None:
            self.first_token_seconds.add(job.first_token - job.queued)

    def text(self) -> str:
        """All of it, in text format."""
        lines = ["# TYPE trenchcoat_requests_total counter"]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'trenchcoat_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, kind, value in (
            ("trenchcoat_prompt_tokens_total", "counter", self.prompt_tokens),
            ("trenchcoat_generated_tokens_total", "counter", self.written_tokens),
            ("trenchcoat_requests_waiting", "gauge", self.waiting),
            ("trenchcoat_requests_running", "gauge", self.running),
            ("trenchcoat_state_bytes", "gauge", self.state_bytes),
            ("process_resident_memory_bytes", "gauge", resident_bytes()),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += self.queue_seconds.lines("trenchcoat_queue_seconds")
        lines += self.first_token_seconds.lines("trenchcoat_first_token_seconds")
        lines += self.run_seconds.lines("trenchcoat_run_seconds")
        return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say (it is read from /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
