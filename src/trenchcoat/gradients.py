"""Accumulated gradients made ready for the optimizer: averaged, checked, and clipped in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trenchcoat.sharding import whole
from trenchcoat.students import StudentAttention

Groups = dict[str, list[nn.Parameter]]
"""Name of a group, for messages -> its parameters."""


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
) -> Groups:
    """``layer``: parameters by the student (so, layer) they belong to, the rest together; ``global``: one group.

    ``stand_ins`` (by name) take the parameters' places in the groups.
    """
    members = trainable if stand_ins is None else stand_ins
    if scope == "global":
        return {"the model": list(members.values())}
    owner: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, StudentAttention):
            owner |= {id(parameter): f"layer {module.layer_idx}" for parameter in module.parameters()}
    groups: Groups = {}
    for name, parameter in trainable.items():
        groups.setdefault(owner.get(id(parameter), "the parameters outside students"), []).append(members[name])
    return groups


def average_and_clip(groups: Groups, micro_batches: int, clip: float | None) -> float:
    """Divide all gradients by ``micro_batches``, clip every group by its own norm; the norm of all before clipping.

    Gradients may be sharded; norms are then those of the whole. Raises ``NonFiniteGradient`` naming the first group
    whose norm is not finite, ``RuntimeError`` when there is no gradient at all.
    """
    gradients = {name: [p.grad for p in group if p.grad is not None] for name, group in groups.items()}
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
