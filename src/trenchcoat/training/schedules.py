"""Learning-rate schedules, each with warm-up, and the number of steps and micro-batches of a stage.

A schedule is a class in ``SCHEDULES``; its key there is its name in ``transfer.schedule`` and ``lora.schedule``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from trenchcoat.config import StageConfig, UserError

PLATEAU_THRESHOLD = 1e-4
"""Relative improvement on the best loss that counts as better (as in torch's ReduceLROnPlateau)."""


class Schedule:
    """Learning rate by step index and the evaluation losses seen so far; the base class is constant.

    A subclass overrides ``rate_at``, or ``observe`` if evaluations change the rate.
    """

    follows_evaluations: ClassVar[bool] = False
    """Whether the rate depends on ``observe``, so that parameter groups can have different rates."""

    def __init__(self, cfg: StageConfig, total_steps: int) -> None:
        self.cfg, self.total = cfg, total_steps
        self.min_lr = min(cfg.min_lr, cfg.lr)
        self.rate = cfg.lr
        self.best = math.inf
        self.bad = 0

    def rate_at(self, share: float) -> float:
        """Rate after a fraction (0 to 1) of the steps that follow the warm-up."""
        return self.rate

    def lr(self, step: int) -> float:
        """Rate of step index ``step`` (from 0)."""
        warmup = self.cfg.warmup_steps
        share = min(max((step - warmup) / max(self.total - warmup, 1), 0.0), 1.0)
        rate = self.rate_at(share)
        return rate * min(1.0, (step + 1) / warmup) if warmup > 0 else rate

    def observe(self, loss: float) -> None:
        """Record an evaluation loss."""

    def state(self) -> dict[str, Any]:
        """State to save, as JSON."""
        return {"rate": self.rate, "best": self.best, "bad": self.bad}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state()`` returned."""
        self.rate, self.best, self.bad = state["rate"], state["best"], state["bad"]


class Cosine(Schedule):
    """From ``lr`` to ``min_lr`` along half a cosine."""

    def rate_at(self, share: float) -> float:
        """Half a cosine from ``lr`` to ``min_lr``."""
        return self.min_lr + (self.cfg.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


class Linear(Schedule):
    """From ``lr`` to ``min_lr`` in a straight line."""

    def rate_at(self, share: float) -> float:
        """A line from ``lr`` to ``min_lr``."""
        return self.min_lr + (self.cfg.lr - self.min_lr) * (1.0 - share)


class Plateau(Schedule):
    """Multiplies the rate by ``plateau_factor`` after more than ``plateau_patience`` evaluations in a row without
    improvement."""

    follows_evaluations = True

    def observe(self, loss: float) -> None:
        """Lower the rate when the loss has not improved for long enough."""
        if loss < self.best * (1.0 - PLATEAU_THRESHOLD):
            self.best, self.bad = loss, 0
            return
        self.bad += 1
        if self.bad > self.cfg.plateau_patience:
            self.rate = max(self.rate * self.cfg.plateau_factor, self.min_lr)
            self.bad = 0


SCHEDULES: dict[str, type[Schedule]] = {
    "plateau": Plateau,
    "cosine": Cosine,
    "linear": Linear,
    "constant": Schedule,
}
"""Add a schedule here."""


def build_schedule(cfg: StageConfig, total_steps: int) -> Schedule:
    """The schedule that ``cfg`` names; raises ``UserError`` for an unknown name."""
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"schedule={cfg.schedule!r} is not known; expected one of {', '.join(SCHEDULES)}")
    return SCHEDULES[cfg.schedule](cfg, total_steps)


def training_length(cfg: StageConfig, epoch: int) -> tuple[int, int]:
    """(micro-batches, optimizer steps) of the whole stage; with ``epochs`` the last step may be shorter."""
    if cfg.max_steps is not None:
        return cfg.max_steps * cfg.accumulation, cfg.max_steps
    micro_batches = math.ceil(cfg.epochs * epoch)
    return micro_batches, math.ceil(micro_batches / cfg.accumulation)


def step_batches(cfg: StageConfig, step: int, micro_batches: int) -> range:
    """Indices of the micro-batches of optimizer step index ``step``; the stage has ``micro_batches`` in total."""
    first = step * cfg.accumulation
    return range(first, min(first + cfg.accumulation, micro_batches))


def evaluation_batches(cfg: StageConfig, available: int) -> int:
    """Number of validation micro-batches per evaluation, at most ``available``."""
    return available if cfg.eval_batches is None else min(available, cfg.eval_batches)
