"""Accumulated gradients made ready for the optimizer: averaged, checked, and clipped in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trenchcoat.students import StudentAttention

Groups = dict[str, list[nn.Parameter]]
"""Name of a group, for messages -> its parameters."""


class NonFiniteGradient(ArithmeticError):
    """The gradient norm of ``group`` is NaN or infinite."""

    def __init__(self, group: str) -> None:
        self.group = group
        super().__init__(f"the gradient norm of {group} is not finite")


def clip_groups(model: nn.Module, trainable: Mapping[str, nn.Parameter], scope: str) -> Groups:
    """``layer``: parameters by the student (so, layer) they belong to, the rest together; ``global``: one group."""
    if scope == "global":
        return {"the model": list(trainable.values())}
    owner: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, StudentAttention):
            owner |= {id(parameter): f"layer {module.layer_idx}" for parameter in module.parameters()}
    groups: Groups = {}
    for parameter in trainable.values():
        groups.setdefault(owner.get(id(parameter), "the parameters outside students"), []).append(parameter)
    return groups


def average_and_clip(groups: Groups, micro_batches: int, clip: float | None) -> float:
    """Divide all gradients by ``micro_batches``, clip every group by its own norm; the norm of all before clipping.

    Raises ``NonFiniteGradient`` naming the first group whose norm is not finite, ``RuntimeError`` when there is no
    gradient at all.
    """
    live = {name: [p for p in group if p.grad is not None] for name, group in groups.items()}
    live = {name: group for name, group in live.items() if group}
    if not live:
        raise RuntimeError("the objective left no gradient on any trainable parameter")
    norms: dict[str, Tensor] = {}
    for name, group in live.items():
        gradients: list[Tensor] = [p.grad for p in group if p.grad is not None]
        if micro_batches > 1:
            torch._foreach_div_(gradients, float(micro_batches))
        norms[name] = torch.nn.utils.get_total_norm(gradients)
    device = next(iter(norms.values())).device
    values = torch.stack([norm.to(device) for norm in norms.values()]).tolist()
    for name, value in zip(norms, values, strict=True):
        if not math.isfinite(value):
            raise NonFiniteGradient(name)
    if clip is not None:
        for name, group in live.items():
            torch.nn.utils.clip_grads_with_norm_(group, clip, norms[name])
    return math.sqrt(sum(value * value for value in values))
