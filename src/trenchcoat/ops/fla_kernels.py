"""Far parts on the kernels of flash-linear-attention (the extra `fla`), which run on CUDA devices in half precision.

Written for fla-core 0.6.0, against whose functions in PyTorch the layout of every argument was checked; the kernels
themselves have not been run by this project. Their meaning: :mod:`trenchcoat.ops.recurrences`.

Shape legend: B rows, H heads, T tokens, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16)
"""Dtypes of q, k and v that the kernels take."""
FIXED = Version("3.7.1")
"""The first triton that does not miscompile the kernels' backward for Hopper; with 3.4 to 3.7.0 fla-core raises an
error there."""
_FEW = 16
"""Up to as many tokens go through the kernel that takes one after the other."""


def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run on q, k, v of `dtype` on `device`; None if they can."""
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if dtype not in FLOATS:
        return f"the kernels of flash-linear-attention compute in bfloat16 or float16, not {dtype}"
    if find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install 'trenchcoat-lm[fla]')"
    from trenchcoat.ops.triton import assembler

    if assembler.is_hopper(device) and Version(assembler.VERSION) < FIXED:
        return f"on Hopper the backward of flash-linear-attention's kernels needs triton {FIXED} or newer"
    return assembler.obstacle(device)


def gated_delta(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, log_forget_BHT: Tensor, beta_BHT: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`trenchcoat.ops.delta_rule.gated_delta`; q, k, v in half precision, gates and S in float32."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    run = fused_recurrent_gated_delta_rule if _one_by_one(v_BHTE) else chunk_gated_delta_rule
    return _delta(run, (q_BHTD, k_BHTD, v_BHTE, log_forget_BHT.float(), beta_BHT.float()), start_BHDE)


def kimi_delta(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, log_forget_BHTD: Tensor, beta_BHT: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`trenchcoat.ops.delta_rule.kimi_delta`; q, k, v in half precision, gates and S in float32."""
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    run = fused_recurrent_kda if _one_by_one(v_BHTE) else chunk_kda
    return _delta(run, (q_BHTD, k_BHTD, v_BHTE, log_forget_BHTD.float(), beta_BHT.float()), start_BHDE)


def gated_sums(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, log_forget_BHT: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`trenchcoat.ops.chunked.decayed.gated_sums`; q, k, v in half precision, gates and S in float32."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    run = fused_recurrent_simple_gla if _one_by_one(v_BHTE) else chunk_simple_gla
    q, k, v, g = _tokens_first(q_BHTD, k_BHTD, v_BHTE, log_forget_BHT.float())
    return _heads_first(run(q, k, v, g=g, scale=1.0, **_state(start_BHDE)))


def _one_by_one(v_BHTE: Tensor) -> bool:
    return v_BHTE.shape[2] <= _FEW and not torch.is_grad_enabled()


def _delta(run: Callable[..., Any], given: tuple[Tensor, ...], start_BHDE: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = _tokens_first(*given)
    return _heads_first(run(q, k, v, g=g, beta=beta, scale=q.shape[3] ** -0.5, **_state(start_BHDE)))


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


def _state(start_BHDE: Tensor) -> dict[str, Any]:
    return {"initial_state": start_BHDE.float().contiguous(), "output_final_state": True}


def _heads_first(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found[0].transpose(1, 2), found[1]
