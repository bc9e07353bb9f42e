"""What a training run must remember to continue as if nothing had happened: counters and the optimizer's state.

There is no random state to remember: every micro-batch seeds the generators by its own index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat.config import UserError


@dataclass
class Counters:
    """Where a stage stands. Losses are evaluation losses (infinite until there is one); steps count from 0."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens the objective counted in them."""
    evaluated_step: int = -1
    initial_loss: float = math.inf
    last_loss: float = math.inf
    seconds: float = 0.0
    """Spent in this stage up to the checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """JSON with null for infinity."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Counters:
        """Back from ``to_json``."""
        values: dict[str, Any] = {field.name: content[field.name] for field in fields(cls)}
        for name, value in values.items():
            values[name] = math.inf if value is None else value
        return cls(**values)


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``{"exp_avg/<parameter>": ...}`` for every slot of every parameter stepped so far."""
    return {
        f"{slot}/{name}": value
        for name, parameter in trainable.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def optimizer_room(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], names: Iterable[str]
) -> dict[str, Tensor]:
    """Zeros for those of ``names`` that are slots (as in ``optimizer_tensors``), put into the unused optimizer.

    Scalars (step counts) stay on the CPU, as torch has them; other slots are shaped and sharded as their parameter is.
    """
    room: dict[str, Tensor] = {}
    for key in names:
        slot, _, name = key.partition("/")
        parameter = trainable.get(name)
        if parameter is not None:
            room[key] = torch.zeros(()) if slot == "step" else torch.zeros_like(parameter, requires_grad=False)
            optimizer.state[parameter][slot] = room[key]
    return room


def require_same_identity(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``UserError`` naming what differs between a checkpoint at ``where`` and the run that would continue it."""
    changes = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict):
            inner = old if isinstance(old, dict) else {}
            plain = {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
            changes += [
                f"{key} {inner.get(key)!r} then, {item!r} now" for key, item in plain.items() if inner.get(key) != item
            ]
        elif old != value:
            changes.append(f"{name.replace('_', ' ')} {old!r} then, {value!r} now")
    if changes:
        raise UserError(
            f"{where} belongs to another run ({'; '.join(changes)}): use another run.dir, undo the change, or delete "
            "that folder to start the stage again"
        )
