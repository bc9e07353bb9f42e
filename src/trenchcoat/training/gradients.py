"""Parameter groups (one per layer, or one for all), each with its own clipping, learning rate and early stopping.

Attention transfer trains the student of each layer on its own loss. With ``clip_scope: layer`` the layers are fully
independent: clipping, learning rate, best weights and early stopping are all per layer. So it makes no difference
which layers are trained together, or where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat.config import LoraConfig, StageConfig, TransferConfig
from trenchcoat.runtime.sharding import whole
from trenchcoat.students import StudentAttention, layer_key
from trenchcoat.training.schedules import build_schedule

COPIES = 0.1
"""Learning rate of copied projections where `transfer.copies_lr` is not given, relative to the stage's."""
BEST = "best/"
"""Prefix of the names of the best weights in a checkpoint."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters clipped by a common norm."""

    name: str
    """For messages."""
    loss: str
    """Name of the group's loss metric; ``loss`` is used if the objective does not report it."""
    parameters: dict[str, nn.Parameter]


class NonFiniteGradient(ArithmeticError):
    """The gradient norm of ``group`` is NaN or infinite."""

    def __init__(self, group: str) -> None:
        self.group = group
        super().__init__(f"the gradient norm of {group} is not finite")


def clip_groups(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    scope: str,
    stand_ins: Mapping[str, nn.Parameter] | None = None,
) -> list[ParamGroup]:
    """``layer``: one group per student (layer), plus one for the rest; ``global``: a single group.

    ``stand_ins`` (by name), such as float32 master copies, replace the parameters in the groups.
    """
    members = trainable if stand_ins is None else stand_ins
    if scope == "global":
        return [ParamGroup("the model", "loss", dict(members))]
    owner: dict[int, ParamGroup] = {}
    for module in model.modules():
        if isinstance(module, StudentAttention):
            group = ParamGroup(f"layer {module.layer_idx}", layer_key("loss", module.layer_idx), {})
            owner |= {id(parameter): group for parameter in module.parameters()}
    rest = ParamGroup("the parameters outside students", "loss", {})
    for name, parameter in trainable.items():
        owner.get(id(parameter), rest).parameters[name] = members[name]
    return [group for group in [*{id(one): one for one in owner.values()}.values(), rest] if group.parameters]


def rate_factors(model: nn.Module, trainable: Mapping[str, nn.Parameter], cfg: StageConfig) -> dict[str, float]:
    """Factors of the stage's learning rate by parameter name; those that are missing are 1.

    Stage 1: ``transfer.copies_lr`` over ``transfer.lr`` for a layer's copied projections. Stage 2: ``lora.mixer_lr``
    over ``lora.lr`` for the students' parameters.
    """
    students = [m for m in model.modules() if isinstance(m, StudentAttention)]
    if isinstance(cfg, TransferConfig):
        own = {id(p) for s in students for p in s.copied_parameters()}
        factor = COPIES if cfg.copies_lr is None else cfg.copies_lr / cfg.lr
    elif isinstance(cfg, LoraConfig) and cfg.mixer_lr is not None:
        own, factor = {id(p) for s in students for p in s.parameters()}, cfg.mixer_lr / cfg.lr
    else:
        return {}
    return {name: factor for name, parameter in trainable.items() if id(parameter) in own}


def average_and_clip(groups: Sequence[ParamGroup], micro_batches: int, clip: float | None) -> float:
    """Divide gradients by ``micro_batches`` and clip each group by its norm; returns the total norm before clipping.

    Gradients may be sharded; norms are those of the full gradients. Raises ``NonFiniteGradient`` naming the first group
    whose norm is not finite, ``RuntimeError`` when there are no gradients at all.
    """
    gradients = {one.name: [p.grad for p in one.parameters.values() if p.grad is not None] for one in groups}
    gradients = {name: found for name, found in gradients.items() if found}
    if not gradients:
        raise RuntimeError("the objective produced no gradient for any trainable parameter")
    norms: list[Tensor] = []
    for found in gradients.values():
        if micro_batches > 1:
            torch._foreach_div_(found, float(micro_batches))
        norms.append(whole(torch.nn.utils.get_total_norm(found)))
    values = dict(zip(gradients, torch.stack([norm.to(norms[0].device) for norm in norms]).tolist(), strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteGradient(name)
    if clip is not None:
        for name, found in gradients.items():
            if values[name] > clip:
                torch._foreach_mul_(found, clip / (values[name] + 1e-6))
    return math.sqrt(sum(value * value for value in values.values()))


class GroupProgress:
    """Learning rate, best weights so far and early stopping of one group."""

    def __init__(self, group: ParamGroup, cfg: StageConfig, total_steps: int) -> None:
        self.group, self.cfg = group, cfg
        self.schedule = build_schedule(cfg, total_steps)
        self.best_loss, self.best_step, self.bad = math.inf, -1, 0
        self._best: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended the group's training."""
        return self.cfg.early_stopping is not None and self.bad >= self.cfg.early_stopping

    def observe(self, numbers: Mapping[str, float], step: int) -> None:
        """Record an evaluation after ``step`` optimizer steps."""
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
        """Copy the best weights, if there are any yet, into the parameters."""
        for name, kept in self._best.items():
            self.group.parameters[name].copy_(kept)

    # Checkpoints: if the best step is the checkpoint's step, the best weights are not saved twice

    def state(self) -> dict[str, Any]:
        """State to save, as JSON."""
        numbers = {"best_loss": self.best_loss, "best_step": self.best_step, "bad": self.bad}
        return {"schedule": self.schedule.state(), **numbers}

    def best_tensors(self, step: int) -> dict[str, Tensor]:
        """The best weights by their names in the checkpoint of ``step``."""
        return {} if self.best_step == step else {f"{BEST}{name}": kept for name, kept in self._best.items()}

    def load_state(self, state: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """Restore ``state``; returns the tensors to fill from the checkpoint of ``step`` before :meth:`loaded`."""
        self.schedule.load_state(state["schedule"])
        self.best_loss, self.best_step, self.bad = state["best_loss"], state["best_step"], state["bad"]
        if self.cfg.restore_best and self.best_step >= 0:
            self._best = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.group.parameters.items()}
        return self.best_tensors(step)

    def loaded(self, step: int) -> None:
        """Call after the weights of ``step`` are loaded: if they are the best ones, keep a copy."""
        if self.best_step == step:
            for name, kept in self._best.items():
                kept.copy_(self.group.parameters[name].detach())


class ParamGroups:
    """All parameter groups of a stage and their progress."""

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        cfg: StageConfig,
        total_steps: int,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self.members = [GroupProgress(group, cfg, total_steps) for group in groups]
        self._factors = factors or {}
        self._rated: list[tuple[GroupProgress, float]] = []
        """Whose schedule each of the optimizer's param groups follows, and its factor."""

    def for_optimizer(self) -> list[dict[str, Any]]:
        """The optimizer's param groups: one per group if their learning rates can differ, else a single one; divided
        by the ``factors`` (by parameter name) of their rates."""
        shared = not self.members[0].schedule.follows_evaluations
        found: dict[tuple[int, float], list[nn.Parameter]] = {}
        for index, member in enumerate(self.members):
            for name, parameter in member.group.parameters.items():
                found.setdefault((0 if shared else index, self._factors.get(name, 1.0)), []).append(parameter)
        self._rated = [(self.members[index], factor) for index, factor in found]
        return [{"params": members} for members in found.values()]

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the optimizer's learning rates for step index ``step``; returns the largest, without factors."""
        rates = {id(member): member.schedule.lr(step) for member in self.members}
        for group, (member, factor) in zip(optimizer.param_groups, self._rated, strict=True):
            group["lr"] = rates[id(member)] * factor
        return max(rates.values())

    def active(self) -> list[ParamGroup]:
        """The groups still training; drops the gradients of the others."""
        for member in self.members:
            if member.stopped:
                for parameter in member.group.parameters.values():
                    parameter.grad = None
        return [member.group for member in self.members if not member.stopped]

    @property
    def stopped(self) -> bool:
        """Whether all groups have stopped early."""
        return all(member.stopped for member in self.members)

    @property
    def best_loss(self) -> float:
        """Mean of the groups' best losses: the loss of the weights that ``restore_best`` ends with."""
        return sum(member.best_loss for member in self.members) / len(self.members)

    @property
    def best_step(self) -> int:
        """The latest of the groups' best steps."""
        return max(member.best_step for member in self.members)

    def state(self) -> dict[str, Any]:
        """State to save, as JSON."""
        return {member.group.name: member.state() for member in self.members}

    def best_tensors(self, step: int) -> dict[str, Tensor]:
        """Best weights that differ from those of ``step``, by their names in its checkpoint."""
        return {name: kept for member in self.members for name, kept in member.best_tensors(step).items()}

    def load_state(self, state: Mapping[str, Any], step: int) -> dict[str, Tensor]:
        """Restore ``state``; see :meth:`GroupProgress.load_state`."""
        found = [member.load_state(state[member.group.name], step) for member in self.members]
        return {name: tensor for tensors in found for name, tensor in tensors.items()}
