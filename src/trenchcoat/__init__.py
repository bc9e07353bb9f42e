"""trenchcoat: pretrained softmax Transformers become linear-time, constant-memory models.

Importing it registers the linearized model classes, so `AutoModelForCausalLM.from_pretrained(merged_folder)` works
afterwards. Heavy dependencies are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trenchcoat.models import auto as _auto

if TYPE_CHECKING:
    from trenchcoat.config import Recipe, StudentConfig, UserError
    from trenchcoat.config.recipe_io import load_recipe
    from trenchcoat.conversion.api import evaluate, finetune, linearize, select, transfer
    from trenchcoat.evaluation.results import Results
    from trenchcoat.evaluation.selection import Selection
    from trenchcoat.generation.generate import Session
    from trenchcoat.generation.statefile import load_state, save_state
    from trenchcoat.models.attach import attach_students, set_mode, set_state_dtype, students_of
    from trenchcoat.models.hub import load, save_adapter, save_merged
    from trenchcoat.models.lora import add_lora, merge_lora
    from trenchcoat.students import StudentAttention, register_student

__all__ = [
    "Recipe",
    "Results",
    "Selection",
    "Session",
    "StudentAttention",
    "StudentConfig",
    "UserError",
    "add_lora",
    "attach_students",
    "evaluate",
    "finetune",
    "linearize",
    "load",
    "load_recipe",
    "load_state",
    "merge_lora",
    "register_student",
    "save_adapter",
    "save_merged",
    "save_state",
    "select",
    "set_mode",
    "set_state_dtype",
    "students_of",
    "transfer",
]

_MODULE_OF = {
    "Results": "evaluation.results",
    "Selection": "evaluation.selection",
    "evaluate": "conversion.api",
    "finetune": "conversion.api",
    "linearize": "conversion.api",
    "select": "conversion.api",
    "transfer": "conversion.api",
    "Recipe": "config",
    "StudentConfig": "config",
    "UserError": "config",
    "load_recipe": "config.recipe_io",
    "StudentAttention": "students",
    "register_student": "students",
    "add_lora": "models.lora",
    "attach_students": "models.attach",
    "merge_lora": "models.lora",
    "set_mode": "models.attach",
    "set_state_dtype": "models.attach",
    "students_of": "models.attach",
    "Session": "generation.generate",
    "load_state": "generation.statefile",
    "save_state": "generation.statefile",
    "load": "models.hub",
    "save_adapter": "models.hub",
    "save_merged": "models.hub",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"trenchcoat.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'trenchcoat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_auto.install()
