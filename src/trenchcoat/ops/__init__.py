"""The attention operator: its meaning (`reference`), its O(T) form (`chunked`), its kernels (`triton`), decoding."""

from trenchcoat.ops.chunked.closed_form import transfer
from trenchcoat.ops.chunked.maps import Learner
from trenchcoat.ops.chunked.rows import Rows
from trenchcoat.ops.crossent import CrossEntropy, attention_cross_entropy
from trenchcoat.ops.decode import decode
from trenchcoat.ops.operator import IMPLEMENTATIONS, attend_with_maps, linear_window_attention
from trenchcoat.ops.state import Features, HeadWeights, Kind, PhiK, RowState, Rule, StateSizes, StudentState, Tokens

__all__ = [
    "IMPLEMENTATIONS",
    "CrossEntropy",
    "Features",
    "HeadWeights",
    "Kind",
    "Learner",
    "PhiK",
    "RowState",
    "Rows",
    "Rule",
    "StateSizes",
    "StudentState",
    "Tokens",
    "attend_with_maps",
    "attention_cross_entropy",
    "decode",
    "linear_window_attention",
    "transfer",
]
