"""The names of what stage 2 can minimize (``lora.loss``).

Recipes are checked against this table before PyTorch is imported, so it names functions instead of importing them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trenchcoat.config import UserError

if TYPE_CHECKING:
    from trenchcoat.config import LoraConfig
    from trenchcoat.training.logits import Teacher
    from trenchcoat.training.objectives import Objective

OBJECTIVES: dict[str, str | Callable[[LoraConfig, Teacher], Objective]] = {
    "kl": "trenchcoat.training.objectives.kl",
    "ce": "trenchcoat.training.objectives.ce",
    "mix": "trenchcoat.training.objectives.mix",
}
"""Valid values of ``lora.loss`` -> the function that makes the objective, or its path. Add an objective here."""


def check_loss(name: str) -> None:
    """Raise ``UserError`` when no objective has this name."""
    if name not in OBJECTIVES:
        raise UserError(f"lora.loss must be one of {', '.join(OBJECTIVES)}, got {name!r}")
