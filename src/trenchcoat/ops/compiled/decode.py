"""Generation on CPUs: one call of the kernels per layer and token, from q, k, v to y and the state after it.

Shape legend: as in :mod:`trenchcoat.ops.decode`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from trenchcoat.ops.compiled.attention import DTYPES, require
from trenchcoat.ops.compiled.build import Unavailable, library
from trenchcoat.ops.compiled.call import MapPointers, View, inner
from trenchcoat.ops.state import FusedMaps, HeadWeights, Rule, StudentState, Tokens

_INTEGERS = (
    "rows", "tokens", "heads", "kv_heads", "key_maps", "dim", "values", "features", "columns", "window", "sinks",
    "far", "narrow", "narrow_slots", "paired", "affine", "threads",
)  # fmt: skip
_FIELDS = ("k_BGND", "v_BGNE", "sink_k_BGSD", "sink_v_BGSE", "far_s_BKFE", "far_z_BKF", "seen_B")


class Step(ctypes.Structure):
    """The structure ``Step`` of ``source/decode.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "eps")),
        *((name, View) for name in ("q", "k", "v", "y")),
        ("query", MapPointers),
        ("key", MapPointers),
        *((name, ctypes.c_void_p) for name in ("mix", "logit", "mask", *_FIELDS)),
    )


def refusal(state: StudentState) -> str | None:
    """Why a state is not decoded by the kernels, or None."""
    if state.far_s_BKFE.dtype != torch.float32 or state.far_z_BKF.dtype != torch.float32:
        return f"far sums in {state.far_s_BKFE.dtype}"
    if state.k_BGND.dtype not in DTYPES:
        return f"buffers in {state.k_BGND.dtype}"
    if not all(getattr(state, name)[0].is_contiguous() for name in _FIELDS[:-1]):
        return "a state that is not contiguous"
    return None


@torch.no_grad()
def decode(
    tokens: Tokens, maps: FusedMaps | None, heads: HeadWeights, states: Sequence[StudentState], rule: Rule
) -> Tensor:
    """y [B, H, T, E] in q's dtype; the states are updated in place. A token with mask False changes nothing and
    outputs 0.

    Args:
        tokens: a few tokens. maps: as for :func:`trenchcoat.ops.compiled.attention.attend`. states: one of B rows, or B
        of one row.

    Raises:
        ValueError: the kernels do not compute the call.
    """
    q, k, v = inner(tokens.q_BHTD), inner(tokens.k_BGTD), inner(tokens.v_BGTE)
    require(rule, q)
    one, maps = states[0], maps if rule.far else None
    rows, count, length, dim = q.shape
    shape = (rows, count, length, v.shape[3])
    mask = tokens.mask_BT
    y = torch.zeros(shape) if mask is not None else torch.empty(shape)
    mask = None if mask is None else mask.to("cpu", torch.uint8).contiguous()
    mix, logit = (None if t is None else t.detach().float() for t in (heads.mix_H, heads.sink_logit_H))
    query, key, kept = _pointers(maps)
    integers = (
        rows, length, count, k.shape[1], maps[1].matrix.shape[0] if maps else count, dim, v.shape[3],
        maps[0].features if maps else 0, maps[0].matrix.shape[2] if maps else 0, rule.window, rule.sinks,
        maps is not None, q.dtype == torch.bfloat16, one.k_BGND.dtype == torch.bfloat16,
        maps is not None and maps[0].paired, rule.affine, torch.get_num_threads(),
    )  # fmt: skip
    step = Step(
        *integers, rule.scale, rule.softcap or 0.0, maps[0].floor if maps else 0.0,
        *(View(x.data_ptr(), *x.stride()[:3]) for x in (q, k, v, y)), query, key,
        *(None if t is None else t.data_ptr() for t in (mix, logit, mask)),
    )  # fmt: skip
    pointers = [_rows(states, name, rows) for name in _FIELDS]
    for name, array in zip(_FIELDS, pointers, strict=True):
        setattr(step, name, ctypes.addressof(array))
    _kernels().decode(ctypes.byref(step))
    del kept, pointers
    for state in states:
        state.counted(length if mask is None else None)
    return y if y.dtype == q.dtype else y.to(q.dtype)


def _pointers(maps: FusedMaps | None) -> tuple[MapPointers, MapPointers, list[Tensor]]:
    """The maps' addresses, and the tensors that they belong to."""
    if maps is None:
        return MapPointers(), MapPointers(), []
    kept = [(phi.matrix.contiguous(), None if phi.bias is None else phi.bias.contiguous()) for phi in maps]
    made = [MapPointers(w.data_ptr(), None if b is None else b.data_ptr(), None, None) for w, b in kept]
    return made[0], made[1], [t for pair in kept for t in pair if t is not None]


def _rows(states: Sequence[StudentState], name: str, rows: int) -> ctypes.Array[ctypes.c_void_p]:
    """The address of each row of a state's tensor."""
    tensors = [getattr(state, name) for state in states]
    if len(tensors) > 1 or rows == 1:
        addresses = [t.data_ptr() for t in tensors]
    else:
        start, stride = tensors[0].data_ptr(), tensors[0].stride(0) * tensors[0].itemsize
        addresses = [start + b * stride for b in range(rows)]
    return (ctypes.c_void_p * rows)(*addresses)


def _kernels() -> ctypes.CDLL:
    found = library()
    if found.step_bytes() != ctypes.sizeof(Step):
        raise Unavailable(f"the kernels expect steps of {found.step_bytes()} bytes, not {ctypes.sizeof(Step)}")
    return found
