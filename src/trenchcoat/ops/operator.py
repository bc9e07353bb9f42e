"""The operator: a softmax window plus linear attention over everything older; one function, several implementations.

:mod:`trenchcoat.ops.reference` defines the formula and the edge cases. This file validates and dispatches.

Shape legend: B rows, H query heads, G key/value heads, K heads of the key map (H or G), T tokens, D key dim, E value
dim, F features, S sinks, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from trenchcoat.ops import reference
from trenchcoat.ops.chunked import chunkwise, closed_form
from trenchcoat.ops.chunked.layout import TILE_TOKENS, Inputs
from trenchcoat.ops.chunked.maps import Learners
from trenchcoat.ops.chunked.rows import Rows, far_keys, sink_pairs, state_after
from trenchcoat.ops.short import is_softmax, softmax_attention
from trenchcoat.ops.state import Features, HeadWeights, Rule, StudentState, Tokens

W = TypeVar("W")
Result = tuple[Tensor, StudentState | None]
IMPLEMENTATIONS: tuple[str, ...] = ("chunkwise", "compiled", "reference")


def linear_window_attention(
    tokens: Tokens,
    features: Features | None,
    heads: HeadWeights,
    rule: Rule,
    *,
    state: StudentState | None = None,
    impl: str = "chunkwise",
) -> Result:
    """Student attention of T tokens, continuing `state` if given.

    Args:
        tokens: q, k, v and the mask.
        features: of q and k; may be None if the rule has no far part.
        heads: raw mix and sink logit per head.
        rule: the formula's settings.
        state: the state before these tokens, empty at the start of a row (not modified, no gradient flows through it).
        impl: one of IMPLEMENTATIONS.

    Returns:
        y [B, H, T, E] in q's dtype, and the state after these tokens if one was given, else None.

    Raises:
        ValueError: mismatched shapes, an unknown `impl`, a state with a buffer without `features.phi_k`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; available here: {', '.join(IMPLEMENTATIONS)}")
    _check(tokens, heads)
    if rule.far:
        _check_features(tokens, features)
    if state is not None and rule.far and rule.slots and (features is None or features.phi_k is None):
        raise ValueError("state is given but phi_k is not; buffered keys need the key feature map to become far")
    features = features if rule.far else None
    if impl == "reference":
        return _reference(tokens, features, heads, rule, state)
    if impl == "chunkwise":
        return _in_chunks(tokens, features, heads, rule, state, chunkwise.aligned_attention)
    from trenchcoat.ops.compiled.attention import aligned_attention, require

    require(rule, tokens.q_BHTD.dtype, tokens.q_BHTD.device)
    return _in_chunks(tokens, features, heads, rule, state, aligned_attention)


def _reference(
    tokens: Tokens, features: Features | None, heads: HeadWeights, rule: Rule, state: StudentState | None
) -> Result:
    y = reference.attention_outputs(tokens, features, heads, rule, state)
    return y, None if state is None else reference.next_state(tokens, features, rule, state)


def _in_chunks(
    tokens: Tokens,
    features: Features | None,
    heads: HeadWeights,
    rule: Rule,
    state: StudentState | None,
    aligned_attention: Callable[[Inputs, Rule], Tensor],
) -> Result:
    """Aligns rows to chunks and continues the state, around an implementation for aligned rows."""
    q, k, v = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE
    rows = Rows.plan(q.shape[0], q.shape[2], rule, tokens.mask_BT, state)
    before = None if state is None or not rule.slots else state
    q = rows.align(q, None if before is None else q.new_zeros(*q.shape[:2], rule.slots, q.shape[3]))
    k = rows.align(k, None if before is None else before.k_BGND)
    v = rows.align(v, None if before is None else before.v_BGNE)
    if is_softmax(q.shape[2], rule, heads, state):
        unused = (heads.mix_H,) if features is None else (heads.mix_H, features.q_BHTF, features.k_BKTF)
        y = rows.restore(softmax_attention(q, k, v, rule, unused))
        return y, None if state is None else state_after(k.detach(), v.detach(), None, rows, rule, state)
    fq = fk = start = None
    if features is not None and features.k_BKTF is not None:
        fq, phi_k = features.q_BHTF, features.phi_k
        fq = rows.align(fq, None if before is None else fq.new_zeros(*fq.shape[:2], rule.slots, fq.shape[3]))
        with torch.no_grad():
            buffered = None if before is None or phi_k is None else phi_k(before.k_BGND)
        fk = far_keys(rows.align(features.k_BKTF, buffered), rows, rule)
        start = None if state is None else (state.far_s_BKFE, state.far_z_BKF)
    sink_k, sink_v = sink_pairs(k, v, rows, rule, state) if rule.sinks else (None, None)
    log_ratio_H = rule.log_ratio(heads.mix_H)
    inputs = Inputs(q, k, v, fq, fk, log_ratio_H, heads.sink_logit_H, sink_k, sink_v, rows.first_B, start)
    y = rows.restore(aligned_attention(inputs, rule))
    return y, None if state is None else state_after(k.detach(), v.detach(), fk, rows, rule, state)


@torch.no_grad()
def attend_with_maps(tokens: Tokens, maps: Learners[W], heads: HeadWeights, rule: Rule) -> Tensor:
    """`linear_window_attention` (chunkwise) of phi_q(q) and phi_k(k), with features computed tile by tile.

    No gradients, no state; y [B, H, T, E] in q's dtype.
    """
    _check(tokens, heads)
    q, k, v = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE
    rows = Rows.plan(q.shape[0], q.shape[2], rule, tokens.mask_BT, None)
    q, k, v = rows.align(q), rows.align(k), rows.align(v)
    if is_softmax(q.shape[2], rule, heads, None):
        return rows.restore(softmax_attention(q, k, v, rule))
    sink_k, sink_v = sink_pairs(k, v, rows, rule, None) if rule.sinks else (None, None)
    log_ratio_H = rule.log_ratio(heads.mix_H)
    x = Inputs(q, k, v, None, None, log_ratio_H, heads.sink_logit_H, sink_k, sink_v, rows.first_B, None)
    short = q.shape[2] * (q.shape[1] // k.shape[1]) <= TILE_TOKENS
    return rows.restore((closed_form.attend if short else chunkwise.attend)(x, maps, rule))


def _check(tokens: Tokens, heads: HeadWeights) -> None:
    q, k, v, mask_BT = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE, tokens.mask_BT
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} axes; expected 4: [B, heads, T, dim]")
    batch, count, length, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (batch, kv_heads, length, dim) or v.shape[:3] != k.shape[:3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: k must be [B, G, T, D] and v [B, G, T, E] with q's B, T and D")
    if kv_heads == 0 or count % kv_heads:
        raise ValueError(f"q has {count} heads and k {kv_heads}; query heads must be a multiple of key/value heads")
    if heads.mix_H.shape != (count,):
        raise ValueError(f"mix has shape {tuple(heads.mix_H.shape)}; expected one number per query head, ({count},)")
    if heads.sink_logit_H is not None and heads.sink_logit_H.shape != (count,):
        raise ValueError(f"sink_logit has shape {tuple(heads.sink_logit_H.shape)}; expected ({count},)")
    if mask_BT is not None and mask_BT.shape != (batch, length):
        raise ValueError(f"mask has shape {tuple(mask_BT.shape)}; expected (B, T) = ({batch}, {length})")


def _check_features(tokens: Tokens, features: Features | None) -> None:
    if features is None or features.k_BKTF is None:
        raise ValueError("features fq and fk are missing; give them, or far=False to leave the far part out")
    (batch, heads, length, _), kv_heads = tokens.q_BHTD.shape, tokens.k_BGTD.shape[1]
    fq, fk = features.q_BHTF, features.k_BKTF
    if fq.shape[:3] != (batch, heads, length):
        raise ValueError(f"fq has shape {tuple(fq.shape)}; expected ({batch}, {heads}, {length}, F)")
    if fk.shape[1] not in (heads, kv_heads) or fk.shape != (batch, fk.shape[1], *fq.shape[2:]):
        want = f"({batch}, {heads} or {kv_heads}, {length}, {fq.shape[3]})"
        raise ValueError(f"fk has shape {tuple(fk.shape)}; expected {want}")
