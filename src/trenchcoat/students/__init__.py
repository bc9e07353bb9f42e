"""The attentions that replace softmax: their computation, training, state and cost."""

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
