"""Learning rates over the optimizer steps: plateau, cosine, linear, constant; each with warm-up."""

from __future__ import annotations

import math
from typing import Any

from trenchcoat.config import StageConfig, UserError

PLATEAU_THRESHOLD = 1e-4
"""An evaluation counts as better when it is below the best one by this share (as in torch's ReduceLROnPlateau)."""


class Schedule:
    """The rate of every optimizer step, as a function of its index and of the evaluation losses seen so far.

    ``plateau`` multiplies the rate by ``plateau_factor`` after more than ``plateau_patience`` evaluations in a row
    without improvement. Raises ``UserError`` for an unknown name.
    """

    def __init__(self, cfg: StageConfig, total_steps: int) -> None:
        if cfg.schedule not in ("plateau", "cosine", "linear", "constant"):
            raise UserError(f"schedule={cfg.schedule!r} is not known; expected plateau, cosine, linear or constant")
        self.cfg, self.total = cfg, total_steps
        self.floor = min(cfg.min_lr, cfg.lr)
        self.rate = cfg.lr
        self.best = math.inf
        self.bad = 0

    def lr(self, step: int) -> float:
        """Rate of the step with index ``step`` (the first is 0)."""
        warmup = self.cfg.warmup_steps
        share = min(max((step - warmup) / max(self.total - warmup, 1), 0.0), 1.0)
        if self.cfg.schedule == "cosine":
            rate = self.floor + (self.cfg.lr - self.floor) * 0.5 * (1.0 + math.cos(math.pi * share))
        elif self.cfg.schedule == "linear":
            rate = self.floor + (self.cfg.lr - self.floor) * (1.0 - share)
        else:
            rate = self.rate
        return rate * min(1.0, (step + 1) / warmup) if warmup > 0 else rate

    def observe(self, loss: float) -> None:
        """Tell the schedule an evaluation loss; only plateau listens."""
        if self.cfg.schedule != "plateau":
            return
        if loss < self.best * (1.0 - PLATEAU_THRESHOLD):
            self.best, self.bad = loss, 0
            return
        self.bad += 1
        if self.bad > self.cfg.plateau_patience:
            self.rate = max(self.rate * self.cfg.plateau_factor, self.floor)
            self.bad = 0

    def state(self) -> dict[str, Any]:
        """What must be saved (JSON; infinity as null)."""
        return {"rate": self.rate, "best": self.best if math.isfinite(self.best) else None, "bad": self.bad}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``."""
        self.rate, self.bad = state["rate"], state["bad"]
        self.best = math.inf if state["best"] is None else state["best"]


def training_length(cfg: StageConfig, epoch: int) -> tuple[int, int]:
    """(micro-batches, optimizer steps) of the whole stage; the last step of an epoch count may be a short one."""
    if cfg.max_steps is not None:
        return cfg.max_steps * cfg.accumulation, cfg.max_steps
    micro_batches = math.ceil(cfg.epochs * epoch)
    return micro_batches, math.ceil(micro_batches / cfg.accumulation)


def step_batches(cfg: StageConfig, step: int, micro_batches: int) -> range:
    """Indices of the micro-batches of the optimizer step with index ``step``, of so many in the whole stage."""
    first = step * cfg.accumulation
    return range(first, min(first + cfg.accumulation, micro_batches))


def evaluation_batches(cfg: StageConfig, available: int) -> int:
    """Validation micro-batches of an evaluation, of so many that there are."""
    return available if cfg.eval_batches is None else min(available, cfg.eval_batches)
