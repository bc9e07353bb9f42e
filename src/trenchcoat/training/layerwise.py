"""Parameters that are scheduled, judged, kept and stopped together: those of one layer, or all that is trained.

Attention transfer trains every layer's student on a loss of its own, and with ``clip_scope: layer`` nothing of one
layer depends on another: neither its clipping nor its learning rate, neither which of its weights are the best nor when
it stops. So it makes no difference which layers are trained together, and where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trenchcoat.config import StageConfig
from trenchcoat.training.gradients import Group
from trenchcoat.training.schedules import Schedule

BEST = "best/"
"""Start of the names under which the best weights stand in a checkpoint."""


class Unit:
    """One group of parameters, its learning rate, its best weights so far, and whether it has stopped."""

    def __init__(self, group: Group, cfg: StageConfig, total_steps: int) -> None:
        self.group, self.cfg = group, cfg
        self.schedule = Schedule(cfg, total_steps)
        self.best_loss, self.best_step, self.bad = math.inf, -1, 0
        self._best: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        """Whether early stopping has had enough of it."""
        return self.cfg.early_stopping is not None and self.bad >= self.cfg.early_stopping

    def observe(self, numbers: Mapping[str, float], step: int) -> None:
        """Take note of an evaluation after ``step`` optimizer steps."""
        if self.stopped:
            return
        loss = numbers.get(self.group.loss, numbers["loss"])
        self.schedule.observe(loss)
        enough = loss < self.best_loss * (1.0 - self.cfg.early_stopping_threshold)
        self.bad = 0 if enough else self.bad + 1
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            if self.cfg.restore_best:
                self._best = {name: p.detach().clone() for name, p in self.group.parameters.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best weights into the parameters; nothing where no evaluation has found any."""
        for name, kept in self._best.items():
            self.group.parameters[name].copy_(kept)

    # Checkpoints: a unit whose best step is the checkpoint's own needs no second copy of its weights

    def state(self) -> dict[str, Any]:
        """What must be saved, as JSON."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"schedule": self.schedule.state(), "best_loss": best, "best_step": self.best_step, "bad": self.bad}

    def best_tensors(self, step: int) -> dict[str, Tensor]:
        """The best weights by their names in the checkpoint of ``step``."""
        return {} if self.best_step == step else {f"{BEST}{name}": kept for name, kept in self._best.items()}

    def room_for_best(self, state: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """Take over ``state``; tensors to be filled from the checkpoint of ``step`` before :meth:`adopt_weights`."""
        self.schedule.load_state(state["schedule"])
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.best_step, self.bad = state["best_step"], state["bad"]
        self._best = {}
        if self.cfg.restore_best and self.best_step >= 0:
            self._best = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.group.parameters.items()}
        return self.best_tensors(step)

    def adopt_weights(self, step: int) -> None:
        """After loading: weights of ``step`` that are the best are kept as such."""
        if self.best_step == step:
            for name, kept in self._best.items():
                kept.copy_(self.group.parameters[name].detach())


class Units:
    """All units of a stage."""

    def __init__(self, groups: Sequence[Group], cfg: StageConfig, total_steps: int) -> None:
        self.members = [Unit(group, cfg, total_steps) for group in groups]
        self.cfg = cfg

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimizer: one group a unit where their learning rates may differ, else one for all."""
        lists = [list(unit.group.parameters.values()) for unit in self.members]
        if self.cfg.schedule != "plateau":
            lists = [[p for members in lists for p in members]]
        return [{"params": members} for members in lists]

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give the optimizer the learning rates of the step with index ``step``; the largest of them."""
        rates = [unit.schedule.lr(step) for unit in self.members]
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        return max(rates)

    def active(self) -> list[Group]:
        """The groups that still learn; the gradients of the others are dropped."""
        for unit in self.members:
            if unit.stopped:
                for parameter in unit.group.parameters.values():
                    parameter.grad = None
        return [unit.group for unit in self.members if not unit.stopped]

    def observe(self, numbers: Mapping[str, float], step: int) -> None:
        """Tell every unit of an evaluation."""
        for unit in self.members:
            unit.observe(numbers, step)

    @property
    def stopped(self) -> bool:
        """Whether all of them have."""
        return all(unit.stopped for unit in self.members)

    @property
    def best_loss(self) -> float:
        """Mean of the units' best losses: the loss of the weights that ``restore_best`` ends with."""
        return sum(unit.best_loss for unit in self.members) / len(self.members)

    @property
    def best_step(self) -> int:
        """The latest of the units' best steps."""
        return max(unit.best_step for unit in self.members)

    def restore_best(self) -> None:
        """End with the best weights of each."""
        for unit in self.members:
            unit.restore_best()

    def state(self) -> dict[str, Any]:
        """What must be saved, as JSON."""
        return {unit.group.name: unit.state() for unit in self.members}

    def best_tensors(self, step: int) -> dict[str, Tensor]:
        """Best weights that differ from those of ``step``, by their names in its checkpoint."""
        return {name: kept for unit in self.members for name, kept in unit.best_tensors(step).items()}

    def room_for_best(self, state: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """Take over ``state``; see :meth:`Unit.room_for_best`."""
        rooms = [unit.room_for_best(state[unit.group.name], step) for unit in self.members]
        return {name: room for rooms_of_unit in rooms for name, room in rooms_of_unit.items()}

    def adopt_weights(self, step: int) -> None:
        """See :meth:`Unit.adopt_weights`."""
        for unit in self.members:
            unit.adopt_weights(step)
