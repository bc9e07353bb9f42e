"""Delta rules in chunks of tokens: the functions that Transformers has for them, in PyTorch, on any device.

Their definitions are in :mod:`trenchcoat.ops.recurrences`. This file holds all that this package uses of the inside of
Transformers; `tests/ops/test_recurrences.py` states what is expected of it.

Shape legend: B rows, H heads, T tokens, D key dim, E value dim.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GATED_DELTA = ("qwen3_next", "torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule")
KIMI_DELTA = ("kimi_linear", "recurrent_kimi_delta_attention", "chunk_kimi_delta_attention")
"""The model that has the functions of a rule, that for one token after the other, and that for chunks."""
_FEW = 4
"""Up to as many tokens one by one; more are computed in chunks, the last of which is filled up."""
_CHUNK, _KIMI_CHUNK = 64, 8
"""Tokens of a chunk. Kimi's function holds chunk x D numbers a token and head, several times: its chunks are short."""
_KIMI_CALL = 64
"""Tokens of a call of Kimi's function for chunks, the time of whose backward grows with their square."""


@functools.cache
def _function(model: str, name: str) -> Callable[..., Any]:
    """Transformers' function in PyTorch, without what would replace it by kernels of a library."""
    return inspect.unwrap(getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name))


def gated_delta(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, log_forget_BHT: Tensor, beta_BHT: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """(q S / sqrt(D) [B, H, T, E], the last S [B, H, D, E]), computed in float32; in v's dtype, with autograd.

    Log gate 0 and beta 0 at a token leave S as it is.
    """
    return _run(GATED_DELTA, _CHUNK, (q_BHTD, k_BHTD, v_BHTE, log_forget_BHT, beta_BHT), start_BHDE)


def kimi_delta(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, log_forget_BHTD: Tensor, beta_BHT: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`gated_delta`, with a gate a key channel."""
    given, state, outputs = (q_BHTD, k_BHTD, v_BHTE, log_forget_BHTD, beta_BHT), start_BHDE, []
    for part in zip(*(x.split(_KIMI_CALL, 2) for x in given), strict=True):
        y, state = _run(KIMI_DELTA, _KIMI_CHUNK, part, state)
        outputs.append(y)
    return torch.cat(outputs, 2), state


def _run(rule: tuple[str, ...], chunk: int, given: tuple[Tensor, ...], start_BHDE: Tensor) -> tuple[Tensor, Tensor]:
    model, one_by_one, in_chunks = rule
    q, k, v, g, beta = (x.transpose(1, 2) for x in given)
    options = {"g": g, "beta": beta, "initial_state": start_BHDE, "output_final_state": True}
    if v.shape[1] <= _FEW:
        y, state = _function(model, one_by_one)(q, k, v, **options)
    else:
        y, state = _function(model, in_chunks)(q, k, v, chunk_size=chunk, **options)
    return y.transpose(1, 2).to(v.dtype), state.to(v.dtype)
