"""The attentions that replace softmax: their computation, training, state and cost.

Names are imported on first use: recipes are checked against `STUDENTS` without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trenchcoat.ops.state import RowState
    from trenchcoat.students.base import Mode, StudentAttention, TransferRequest, layer_key
    from trenchcoat.students.feature_maps import ACTIVATIONS, Activation, FeatureMap, register_feature_map
    from trenchcoat.students.registry import STUDENTS, build_student, operator_of, register_student, student_class
    from trenchcoat.students.sums import SumAttention

__all__ = [
    "ACTIVATIONS",
    "STUDENTS",
    "Activation",
    "FeatureMap",
    "Mode",
    "RowState",
    "StudentAttention",
    "SumAttention",
    "TransferRequest",
    "build_student",
    "layer_key",
    "operator_of",
    "register_feature_map",
    "register_student",
    "student_class",
]

_NAMES = {
    "ops.state": ("RowState",),
    "students.base": ("Mode", "StudentAttention", "TransferRequest", "layer_key"),
    "students.feature_maps": ("ACTIVATIONS", "Activation", "FeatureMap", "register_feature_map"),
    "students.registry": ("STUDENTS", "build_student", "operator_of", "register_student", "student_class"),
    "students.sums": ("SumAttention",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"trenchcoat.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'trenchcoat.students' has no attribute {name!r}")
