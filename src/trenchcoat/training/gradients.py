"""Accumulated gradients made ready for the optimizer: averaged, checked, and clipped in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trenchcoat.runtime.sharding import whole
from trenchcoat.students import StudentAttention, layer_key


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped by one norm."""

    name: str
    """For messages."""
    loss: str
    """Name of the metric that is their loss, where the objective gives it; else it is ``loss``."""
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
) -> list[Group]:
    """``layer``: parameters by the student (so, layer) they belong to, the rest together; ``global``: one group.

    ``stand_ins`` (by name) take the parameters' places in the groups.
    """
    members = trainable if stand_ins is None else stand_ins
    if scope == "global":
        return [Group("the model", "loss", dict(members))]
    owner: dict[int, Group] = {}
    for module in model.modules():
        if isinstance(module, StudentAttention):
            group = Group(f"layer {module.layer_idx}", layer_key("loss", module.layer_idx), {})
            owner |= {id(parameter): group for parameter in module.parameters()}
    rest = Group("the parameters outside students", "loss", {})
    for name, parameter in trainable.items():
        owner.get(id(parameter), rest).parameters[name] = members[name]
    return [group for group in [*{id(one): one for one in owner.values()}.values(), rest] if group.parameters]


def average_and_clip(groups: Sequence[Group], micro_batches: int, clip: float | None) -> float:
    """Divide all gradients by ``micro_batches``, clip every group by its own norm; the norm of all before clipping.

    Gradients may be sharded; norms are then those of the whole. Raises ``NonFiniteGradient`` naming the first group
    whose norm is not finite, ``RuntimeError`` when there is no gradient at all.
    """
    gradients = {one.name: [p.grad for p in one.parameters.values() if p.grad is not None] for one in groups}
    gradients = {name: found for name, found in gradients.items() if found}
    if not gradients:
        raise RuntimeError("the objective left no gradient on any trainable parameter")
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
