"""The attention operator: its definition (`reference`), its O(T) form (`chunked`), its kernels (`compiled` for CPUs,
`triton` for GPUs), decoding."""

from trenchcoat.ops.operator import IMPLEMENTATIONS, linear_window_attention
from trenchcoat.ops.state import (
    Features,
    GatedState,
    HeadWeights,
    Kind,
    RowState,
    Rule,
    StateSizes,
    StudentState,
    Tokens,
)

__all__ = [
    "IMPLEMENTATIONS",
    "Features",
    "GatedState",
    "HeadWeights",
    "Kind",
    "RowState",
    "Rule",
    "StateSizes",
    "StudentState",
    "Tokens",
    "linear_window_attention",
]
