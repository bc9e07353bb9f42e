"""A job that sleeps, for tests of launchers: light to start, and it may ignore SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sleeper:
    """In place of a ``jobs.Task``; ``stubborn``: it ignores SIGTERM, and watches its parent as one does."""

    stubborn: bool = False
    device: str | None = None

    def __call__(self) -> None:
        """Say its process number in a file, then sleep."""
        if self.stubborn:
            from trenchcoat.linearize.blocks.jobs import _end_with

            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.stubborn else signal.SIG_DFL)
        Path(os.environ["SUBMITIT_FOLDER"], "awake").write_text(str(os.getpid()))
        time.sleep(600)


@dataclass(frozen=True)
class Failing:
    """In place of a task: it fails at once."""

    device: str | None = None

    def __call__(self) -> None:
        """Raise."""
        raise ValueError("a line before\nthe disk is full")
