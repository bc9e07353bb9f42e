"""The gated delta rule in chunks of tokens: the functions that Transformers has for it, in PyTorch, on any device.

:func:`trenchcoat.ops.recurrences.gated_delta` is the definition. This file holds all that this package uses of the
inside of Transformers; `tests/ops/test_recurrences.py` states what is expected of it.

Shape legend: B rows, H heads, T tokens, D key dim, E value dim.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

_HOME = "transformers.models.qwen3_next.modeling_qwen3_next"
_FEW = 4
"""Up to as many tokens one by one; more are computed in chunks of 64, the last of which is filled up."""


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    """Transformers' function in PyTorch, without what would replace it by kernels of a library."""
    return inspect.unwrap(getattr(importlib.import_module(_HOME), name))


def gated_delta(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, log_forget_BHT: Tensor, beta_BHT: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """(q S / sqrt(D) [B, H, T, E], the last S [B, H, D, E]), computed in float32; in v's dtype, with autograd.

    Log gate 0 and beta 0 at a token leave S as it is.
    """
    few = v_BHTE.shape[2] <= _FEW
    run = _function("torch_recurrent_gated_delta_rule" if few else "torch_chunk_gated_delta_rule")
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q_BHTD, k_BHTD, v_BHTE, log_forget_BHT, beta_BHT))
    y, state = run(q, k, v, g=g, beta=beta, initial_state=start_BHDE, output_final_state=True)
    return y.transpose(1, 2).to(v_BHTE.dtype), state.to(v_BHTE.dtype)
