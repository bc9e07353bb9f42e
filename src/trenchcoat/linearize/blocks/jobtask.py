"""What a job of a launcher does, in its own process: a command of `trenchcoat blocks`, and how it ends.

submitit (https://github.com/facebookincubator/submitit) pickles a :class:`Task`, and calls it in the job.

    it returns, or raises        submitit leaves a result, which says so
    SIGTERM                      training saves a checkpoint after its step and stops; then local: the job ends;
                                 Slurm: the job asks to be queued again (`scontrol requeue`)
    Slurm's preemption signal    (SIGUSR2, also sent some time before the time limit) the same; what takes longer than
                                 ``SAVE_SECONDS`` goes back to the checkpoint before
    killed, machine lost         no result: the launcher counts it as failed
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import submitit

from trenchcoat.config import Recipe
from trenchcoat.linearize.blocks import stages as blockstages
from trenchcoat.linearize.workshop import Stopped
from trenchcoat.runtime.lock import InUse

Step = Literal["collect", "train", "stitch"]

SAVE_SECONDS = 60
"""Time a Slurm job has for its step and a checkpoint after the preemption signal."""
LOCK_SECONDS = 2.0
"""Between two looks at a block that another process holds."""


@dataclass(frozen=True)
class Task:
    """What one job does; called in its process."""

    recipe: Recipe
    step: Step
    number: int = 0
    """Of the block to train."""
    device: str | None = None
    """For CUDA_VISIBLE_DEVICES; None leaves what the scheduler says."""

    def __call__(self) -> Any:
        """Do it; what ``trenchcoat blocks`` would show."""
        if self.device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.device
        with _stoppable():
            if self.step == "collect":
                return blockstages.collect(self.recipe)
            return self._train() if self.step == "train" else blockstages.stitch(self.recipe)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit is to call when the job runs again: the same, as all that is saved is found again."""
        return submitit.helpers.DelayedSubmission(self)

    def _train(self) -> Any:
        told = False
        while True:
            try:
                return blockstages.train(self.recipe, self.number)
            except InUse as error:
                if not told:
                    logging.getLogger(__name__).warning("%s This job waits for it.", error)
                told = True
                time.sleep(LOCK_SECONDS)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside a job: end it, or have it queued again, as the head of this file says."""
    requeue = signal.getsignal(signal.SIGUSR2)
    on_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    def run_again(number: int, frame: FrameType | None) -> None:
        for kind in (signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM):  # Slurm will send some of these now
            signal.signal(kind, signal.SIG_IGN)
        assert callable(requeue)
        requeue(signal.SIGUSR2, None)

    def save_then_stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, run_again)
        signal.alarm(SAVE_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    if on_slurm:
        signal.signal(signal.SIGUSR2, save_then_stop)
    else:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except Stopped:
        if not on_slurm:
            raise SystemExit("stopped; everything is saved") from None
        run_again(signal.SIGUSR2, None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR2, requeue)


def _end_with(parent: int) -> None:
    """End this process when its parent, submitit's controller, is gone: nobody would know of it any more."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
