"""What a training run must remember to continue as if nothing had happened: counters, optimizer, random state."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    bad: int = 0
    """Evaluations since the best one."""
    evaluated_step: int = -1
    best_step: int = -1
    initial_loss: float = math.inf
    last_loss: float = math.inf
    best_loss: float = math.inf
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


def load_optimizer(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Fill an unused optimizer from ``optimizer_tensors``; scalars (step counts) stay on the CPU, as torch has them."""
    for key, value in tensors.items():
        slot, name = key.split("/", 1)
        parameter = trainable[name]
        place = value.device if value.dim() == 0 else parameter.device
        optimizer.state[parameter][slot] = value.to(place, copy=True)


def random_state() -> dict[str, Tensor]:
    """The generators' states of the CPU and of every GPU in use."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state |= {f"cuda:{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Back from ``random_state``; GPUs that are not here are passed over."""
    torch.set_rng_state(state["cpu"].clone())
    for name, value in state.items():
        if name.startswith("cuda:") and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.clone(), name)


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
