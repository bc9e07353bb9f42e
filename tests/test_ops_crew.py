"""The crew of threads: every task once and in order, a failure reaches the caller, settings are put back."""

from __future__ import annotations

import threading

import pytest
import torch

from trenchcoat.ops import crew
from trenchcoat.ops.tiles import Scratch

pytestmark = pytest.mark.usefixtures("threads")


def _run(work: object, tasks: int = 20) -> list[int]:
    device = torch.device("cpu")
    size = crew.crew_size(100, device)
    return crew.run(range(tasks), work, crew=size, device=device, dtype=torch.float32, purpose="test")  # type: ignore[arg-type]


def test_results_come_in_the_order_of_the_tasks(threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)
    seen: set[int] = set()

    def work(task: int, _: Scratch) -> int:
        if task < threads:
            together.wait()  # passes only when `threads` tasks run at the same time
        seen.add(threading.get_ident())
        return task * task

    assert _run(work) == [task * task for task in range(20)]
    assert len(seen) == threads


def test_a_failure_in_any_thread_is_raised_and_stops_the_rest() -> None:
    begun: list[int] = []

    def work(task: int, _: Scratch) -> int:
        begun.append(task)
        if task == 2:
            raise ValueError("task 2 is broken")
        return task

    with pytest.raises(ValueError, match="task 2 is broken"):
        _run(work, tasks=1000)
    assert len(begun) < 1000


def test_few_threads_serve_long_operations_together(threads: int) -> None:
    assert crew.crew_size(100, torch.device("cpu"), least=threads) == threads
    assert crew.crew_size(100, torch.device("cpu"), least=threads + 1) == 1


def test_tasks_record_nothing_for_autograd() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert _run(lambda task, _: int((weight * task).requires_grad)) == [0] * 20
