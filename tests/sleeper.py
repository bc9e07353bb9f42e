"""A sleeping job for launcher tests: starts quickly and can ignore SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sleeper:
    """Replaces a ``jobs.Task``; ``stubborn``: ignores SIGTERM, and watches its parent like a real task."""

    stubborn: bool = False
    device: str | None = None

    def __call__(self) -> None:
        """Write the process id to a file, then sleep."""
        if self.stubborn:
            from trenchcoat.conversion.blocks.jobs import _end_with

            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.stubborn else signal.SIG_DFL)
        Path(os.environ["SUBMITIT_FOLDER"], "awake").write_text(str(os.getpid()))
        time.sleep(600)


@dataclass(frozen=True)
class Failing:
    """Replaces a task and fails immediately."""

    device: str | None = None

    def __call__(self) -> None:
        """Raise."""
        raise ValueError("a line before\nthe disk is full")
