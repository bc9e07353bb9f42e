"""The operator: a softmax window plus linear attention over everything older, by one name and several implementations.

The formula and the edge cases are written out in :mod:`trenchcoat.ops.reference`. This file validates and dispatches.

Shape legend: B rows, H query heads, G key/value heads, K heads of the key map (H or G), T tokens, D key dim, E value
dim, F features, S sinks, W window.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

from trenchcoat.ops import reference
from trenchcoat.ops.chunked import chunkwise, closed_form
from trenchcoat.ops.chunked.closed_form import transfer
from trenchcoat.ops.chunked.layout import TILE_TOKENS, Inputs
from trenchcoat.ops.chunked.maps import Learner
from trenchcoat.ops.chunked.rows import Rows, far_keys, sink_pairs, state_after
from trenchcoat.ops.crossent import CrossEntropy, attention_cross_entropy
from trenchcoat.ops.decode import decode
from trenchcoat.ops.state import Kind, PhiK, Rule, StudentState

Impl = Literal["chunkwise", "reference"]
W = TypeVar("W")
IMPLEMENTATIONS: tuple[str, ...] = ("chunkwise", "reference")

__all__ = [
    "IMPLEMENTATIONS",
    "CrossEntropy",
    "Impl",
    "Kind",
    "Learner",
    "PhiK",
    "Rows",
    "Rule",
    "StudentState",
    "attend_with_maps",
    "attention_cross_entropy",
    "decode",
    "decode_step",
    "linear_window_attention",
    "transfer",
]


def linear_window_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    fq_BHTF: Tensor | None,
    fk_BKTF: Tensor | None,
    mix_H: Tensor,
    *,
    kind: Kind,
    window: int,
    scale: float,
    softcap: float | None = None,
    sink_logit_H: Tensor | None = None,
    sinks: int = 0,
    affine: bool = False,
    far: bool = True,
    mask_BT: Tensor | None = None,
    state: StudentState | None = None,
    phi_k: PhiK | None = None,
    return_state: bool = False,
    impl: str = "chunkwise",
) -> tuple[Tensor, StudentState | None]:
    """Student attention of T tokens, continuing `state` when one is given.

    Args:
        q_BHTD, k_BGTD, v_BGTE: after RoPE and norms, any floating dtype; H a multiple of G.
        fq_BHTF, fk_BKTF: features of q and k (float32), K = H or G; None with `far=False`.
        mix_H: raw mix; g = sigmoid(mix) weighs the near part.
        kind, window, scale, softcap, sink_logit_H, sinks, affine, far: the formula's settings.
        mask_BT: True at real tokens, any pattern; outputs elsewhere are 0.
        state: what came before (not modified, no gradient flows through it).
        phi_k: key feature map, needed when a state with a buffer comes in and `far` is on.
        return_state: also give the state after these tokens.
        impl: one of IMPLEMENTATIONS.

    Returns:
        y [B, H, T, E] in q's dtype, and the state or None.

    Raises:
        ValueError: shapes that do not fit, an unknown `impl`, a state without `phi_k`.
    """
    rule = Rule(kind=kind, window=window, scale=scale, softcap=softcap, sinks=sinks, affine=affine, far=far)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; available here: {', '.join(IMPLEMENTATIONS)}")
    _check(q_BHTD, k_BGTD, v_BGTE, mix_H, sink_logit_H, mask_BT)
    if rule.far:
        _check_features(q_BHTD, k_BGTD, fq_BHTF, fk_BKTF)
    if state is not None and far and rule.slots and phi_k is None:
        raise ValueError("state is given but phi_k is not; buffered keys need the key feature map to become far")
    if return_state and state is None:
        state = _fresh_state(k_BGTD, v_BGTE, fk_BKTF, rule)
    run = _chunkwise if impl == "chunkwise" else _reference
    return run(
        (q_BHTD, k_BGTD, v_BGTE, fq_BHTF, fk_BKTF, mix_H), rule, sink_logit_H, mask_BT, state, phi_k, return_state
    )


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


def _reference(
    x: _Tensors,
    rule: Rule,
    sink_logit_H: Tensor | None,
    mask_BT: Tensor | None,
    state: StudentState | None,
    phi_k: PhiK | None,
    return_state: bool,
) -> tuple[Tensor, StudentState | None]:
    y = reference.attention(*x, rule=rule, sink_logit_H=sink_logit_H, mask_BT=mask_BT, state=state, phi_k=phi_k)
    if not return_state or state is None:
        return y, None
    return y, reference.next_state(x[1], x[2], x[4], rule=rule, mask_BT=mask_BT, state=state, phi_k=phi_k)


def _chunkwise(
    x: _Tensors,
    rule: Rule,
    sink_logit_H: Tensor | None,
    mask_BT: Tensor | None,
    state: StudentState | None,
    phi_k: PhiK | None,
    return_state: bool,
) -> tuple[Tensor, StudentState | None]:
    q, k, v, fq, fk, mix_H = x
    rows = Rows.plan(q.shape[0], q.shape[2], rule, mask_BT, state)
    before = None if state is None or not rule.slots else state
    q = rows.align(q, None if before is None else q.new_zeros(*q.shape[:2], rule.slots, q.shape[3]))
    k = rows.align(k, None if before is None else before.k_BGND)
    v = rows.align(v, None if before is None else before.v_BGNE)
    start = None
    if rule.far and fq is not None and fk is not None:
        fq = rows.align(fq, None if before is None else fq.new_zeros(*fq.shape[:2], rule.slots, fq.shape[3]))
        with torch.no_grad():
            buffered = None if before is None or phi_k is None else phi_k(before.k_BGND)
        fk = far_keys(rows.align(fk, buffered), rows, rule)
        start = None if state is None else (state.far_s_BKFE, state.far_z_BKF)
    else:
        fq = fk = None
    sink_k, sink_v = sink_pairs(k, v, rows, rule, state) if rule.sinks else (None, None)
    inputs = Inputs(q, k, v, fq, fk, rule.log_ratio(mix_H), sink_logit_H, sink_k, sink_v, rows.first_B, start)
    y = rows.restore(chunkwise.aligned_attention(inputs, rule=rule))
    if not return_state or state is None:
        return y, None
    return y, state_after(k.detach(), v.detach(), fk, rows, rule, state)


@torch.no_grad()
def attend_with_maps(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    query: Learner[W],
    key: Learner[W],
    mix_H: Tensor,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """`linear_window_attention` (chunkwise) of phi_q(q) and phi_k(k), with features that exist only tile by tile.

    No gradients and no state; y [B, H, T, E] in q's dtype.
    """
    _check(q_BHTD, k_BGTD, v_BGTE, mix_H, sink_logit_H, mask_BT)
    rows = Rows.plan(q_BHTD.shape[0], q_BHTD.shape[2], rule, mask_BT, None)
    q, k, v = rows.align(q_BHTD), rows.align(k_BGTD), rows.align(v_BGTE)
    sink_k, sink_v = sink_pairs(k, v, rows, rule, None) if rule.sinks else (None, None)
    x = Inputs(q, k, v, None, None, rule.log_ratio(mix_H), sink_logit_H, sink_k, sink_v, rows.first_B, None)
    short = q.shape[2] * (q.shape[1] // k.shape[1]) <= TILE_TOKENS
    attend = closed_form.attend if short else chunkwise.attend
    return rows.restore(attend(x, query, key, rule=rule))


@torch.no_grad()
def decode_step(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    fq_BHTF: Tensor | None,
    fk_BKTF: Tensor | None,
    mix_H: Tensor,
    state: StudentState,
    *,
    kind: Kind,
    window: int,
    scale: float,
    softcap: float | None = None,
    sink_logit_H: Tensor | None = None,
    sinks: int = 0,
    affine: bool = False,
    far: bool = True,
    mask_BT: Tensor | None = None,
    phi_k: PhiK | None = None,
) -> Tensor:
    """As :func:`linear_window_attention` for a few tokens, updating `state` in place; no gradients.

    `fk_BKTF` may be None but for kind `linear`: other kinds compute a key's features when it leaves the buffer.
    """
    rule = Rule(kind=kind, window=window, scale=scale, softcap=softcap, sinks=sinks, affine=affine, far=far)
    _check(q_BHTD, k_BGTD, v_BGTE, mix_H, sink_logit_H, mask_BT)
    if rule.far:
        unused = fk_BKTF is None and kind != "linear"
        _check_features(q_BHTD, k_BGTD, fq_BHTF, fq_BHTF if unused else fk_BKTF)
    return decode(
        q_BHTD,
        k_BGTD,
        v_BGTE,
        fq_BHTF if far else None,
        fk_BKTF if far else None,
        rule.ratio(mix_H),
        state,
        rule=rule,
        sink_logit_H=sink_logit_H,
        mask_BT=mask_BT,
        phi_k=phi_k,
    )


def _fresh_state(k_BGTD: Tensor, v_BGTE: Tensor, fk_BKTF: Tensor | None, rule: Rule) -> StudentState:
    return StudentState.empty(
        k_BGTD.shape[0],
        rule=rule,
        kv_heads=k_BGTD.shape[1],
        key_map_heads=0 if fk_BKTF is None else fk_BKTF.shape[1],
        key_dim=k_BGTD.shape[-1],
        value_dim=v_BGTE.shape[-1],
        features=0 if fk_BKTF is None else fk_BKTF.shape[-1],
        dtype=k_BGTD.dtype,
        device=k_BGTD.device,
    )


def _check(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    mix_H: Tensor,
    sink_logit_H: Tensor | None,
    mask_BT: Tensor | None,
) -> None:
    if q_BHTD.ndim != 4 or k_BGTD.ndim != 4 or v_BGTE.ndim != 4:
        raise ValueError(
            f"q, k, v have {q_BHTD.ndim}, {k_BGTD.ndim}, {v_BGTE.ndim} axes; expected 4: [B, heads, T, dim]"
        )
    batch, heads, tokens, dim = q_BHTD.shape
    kv_heads = k_BGTD.shape[1]
    if k_BGTD.shape != (batch, kv_heads, tokens, dim) or v_BGTE.shape[:3] != k_BGTD.shape[:3]:
        shapes = f"q {tuple(q_BHTD.shape)}, k {tuple(k_BGTD.shape)}, v {tuple(v_BGTE.shape)}"
        raise ValueError(f"{shapes}: k must be [B, G, T, D] and v [B, G, T, E] with q's B, T and D")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k {kv_heads}; query heads must be a multiple of key/value heads")
    if mix_H.shape != (heads,):
        raise ValueError(f"mix has shape {tuple(mix_H.shape)}; expected one number per query head, ({heads},)")
    if sink_logit_H is not None and sink_logit_H.shape != (heads,):
        raise ValueError(f"sink_logit has shape {tuple(sink_logit_H.shape)}; expected ({heads},)")
    if mask_BT is not None and mask_BT.shape != (batch, tokens):
        raise ValueError(f"mask has shape {tuple(mask_BT.shape)}; expected (B, T) = ({batch}, {tokens})")


def _check_features(q_BHTD: Tensor, k_BGTD: Tensor, fq_BHTF: Tensor | None, fk_BKTF: Tensor | None) -> None:
    (batch, heads, tokens, _), kv_heads = q_BHTD.shape, k_BGTD.shape[1]
    if fq_BHTF is None or fk_BKTF is None:
        raise ValueError("features fq and fk are missing; give them, or far=False to leave the far part out")
    if fq_BHTF.shape[:3] != (batch, heads, tokens):
        raise ValueError(f"fq has shape {tuple(fq_BHTF.shape)}; expected ({batch}, {heads}, {tokens}, F)")
    if fk_BKTF.shape[1] not in (heads, kv_heads) or fk_BKTF.shape != (batch, fk_BKTF.shape[1], *fq_BHTF.shape[2:]):
        want = f"({batch}, {heads} or {kv_heads}, {tokens}, {fq_BHTF.shape[3]})"
        raise ValueError(f"fk has shape {tuple(fk_BKTF.shape)}; expected {want}")
