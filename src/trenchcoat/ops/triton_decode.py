"""Generation as Triton kernels: one token after the other against a state of constant size, updated in place.

A step is two launches and an addition, with no question to the host, so that it can be captured in a CUDA graph:
`fold_leaving` adds keys that leave the window to the far sums (with terraces once in W steps; otherwise it returns at
once), `read_step` attends and stores the new pair. A program serves all query heads that share a key map, so that their
far sum is read once. Products of single tokens are added up in float32, without tensor cores.

Shape legend: as in :mod:`trenchcoat.ops.triton_parts`; N buffer slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trenchcoat.ops.state import Rule, StudentState
from trenchcoat.ops.triton_forward import fold
from trenchcoat.ops.triton_launch import Call, FusedMap, Spans, block, refusal, run
from trenchcoat.ops.triton_parts import (
    activate,
    key_features,
    load_map,
    load_sums,
    load_tile,
    place,
    store_sums,
)

VALUES_A_PROGRAM = 64
"""Columns of the far sum one program reads; kind linear, which also writes them, takes all."""


@triton.jit
def exists(real_ptr, b):
    """Whether row b has a token now."""
    if real_ptr is None:
        return True
    else:
        return tl.load(real_ptr + b) != 0


@triton.jit
def fold_leaving(K, V, KEY, FAR, seen_ptr, real_ptr, maps, kv_heads, slots, C: tl.constexpr, COUNT: tl.constexpr):
    """Adds buffered keys that were near for the last token and are far for the one to come; grid (B K,)."""
    b, m = tl.program_id(0) // maps, tl.program_id(0) % maps
    seen = tl.load(seen_ptr + b).to(tl.int32)
    leaving = exists(real_ptr, b) & (seen >= slots) & (seen % COUNT == 0)
    if leaving:
        i = tl.arange(0, C.block_w)
        position = seen - slots + i
        ok = (i < COUNT) & (position >= C.sinks)
        g = m * kv_heads // maps
        k = load_tile(place(K, b, g, 0), K[3], position % slots, ok, C.dim, C.block_d)
        v = load_tile(place(V, b, g, 0), V[3], position % slots, ok, C.values, C.block_e)
        matrix, remainder, bias = load_map(KEY, m, C)
        f, half = key_features(k, position, matrix, remainder, bias, C)
        s1, s2, z1, z2 = load_sums(FAR, tl.program_id(0), C)
        s1, s2, z1, z2 = fold(s1, s2, z1, z2, f, half, v, ok, C)
        store_sums(FAR, tl.program_id(0), s1, s2, z1, z2, C)


@triton.jit
def load_vector(X, b, h, N: tl.constexpr, BLOCK: tl.constexpr):
    """The one token of row b, head h, float32."""
    n = tl.arange(0, BLOCK)
    return tl.load(place(X, b, h, 0) + n, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def vector_features(x, M, head, C: tl.constexpr):
    """(f, g) [P] of one token."""
    matrix, _remainder, bias = load_map(M, head, C)
    u = (tl.sum(x[:, None] * matrix, 0) + bias)[None, :]
    f = activate(u, C)
    g = f
    if C.paired:
        g = activate(-u, C)
    return tl.sum(f, 0), tl.sum(g, 0)


@triton.jit
def bend(s, cap, C: tl.constexpr):
    """The soft-cap."""
    if C.softcap:
        e = tl.exp(-2.0 * tl.abs(s) / cap)
        bent = cap * (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0, -bent, bent)
    return s


@triton.jit
def load_slice(FAR, row, half, e, C: tl.constexpr):
    """(address, sums [P, columns e], counts [P]) of one half of a far sum."""
    halves: tl.constexpr = 2 if C.paired else 1
    p = tl.arange(0, C.block_p)
    at = (row * halves + half).to(tl.int64) * C.columns + p
    ok = (p[:, None] < C.columns) & (e[None, :] < C.values)
    s = tl.load(FAR[0] + at[:, None] * C.values + e[None, :], mask=ok, other=0.0)
    return at, s, tl.load(FAR[1] + at, mask=p < C.columns, other=0.0)


@triton.jit
def absorb(FAR, row, half, f, v, e, C: tl.constexpr):
    """Kind linear: the token joins the far sums before it is read."""
    at, s, z = load_slice(FAR, row, half, e, C)
    p = tl.arange(0, C.block_p)
    ok = (p[:, None] < C.columns) & (e[None, :] < C.values)
    tl.store(FAR[0] + at[:, None] * C.values + e[None, :], s + f[:, None] * v[None, :], mask=ok)
    tl.store(FAR[1] + at, z + f, mask=p < C.columns)


@triton.jit
def near_step(q, k_new, v_new, ring_k, ring_v, visible, logit, ratio, scale, cap, C: tl.constexpr):
    """(numerator [columns], denominator) of the near part; ring: buffer and sinks, [slots, D] and [slots, columns]."""
    s = tl.where(visible, bend(tl.sum(ring_k * q[None, :], 1) * scale, cap, C), float("-inf"))
    s_new = bend(tl.sum(k_new * q, 0) * scale, cap, C)
    top = tl.maximum(tl.max(s, 0), s_new)
    if C.sink_logit:
        top = tl.maximum(top, logit)
    w = tl.exp(s - top)
    w_new = tl.exp(s_new - top)
    total = tl.sum(w, 0) + w_new
    if C.sink_logit:
        total += tl.exp(logit - top)
    return ratio * (tl.sum(w[:, None] * ring_v, 0) + w_new * v_new), ratio * total


@triton.jit
def load_ring(X, SINK, b, g, i, n, visible, slots, N: tl.constexpr, BLOCK: tl.constexpr):
    """Buffer slots, then sinks: [slots + sinks, columns n], float32."""
    there = visible[:, None] & (n[None, :] < N)
    x = tl.load(
        place(X, b, g, 0) + i[:, None].to(tl.int64) * X[3] + n[None, :], mask=there & (i[:, None] < slots), other=0.0
    )
    if SINK[0] is not None:
        at = place(SINK, b, g, 0) + (i[:, None] - slots).to(tl.int64) * SINK[3] + n[None, :]
        x = tl.where(i[:, None] < slots, x, tl.load(at, mask=there & (i[:, None] >= slots), other=0.0))
    return x.to(tl.float32)


@triton.jit
def store_pair(X, SINK, b, g, x, n, position, slots, N: tl.constexpr, C: tl.constexpr):
    """The new key or value takes its slot (and its sink slot)."""
    x = x.to(X[0].dtype.element_ty)
    tl.store(place(X, b, g, 0) + (position % slots) * X[3] + n, x, mask=n < N)
    if C.sinks > 0:
        tl.store(place(SINK, b, g, 0) + position * SINK[3] + n, x, mask=(n < N) & (position < C.sinks))


@triton.jit
def read_step(
    Q, K, V, Y, K_RING, V_RING, SINK_K, SINK_V, QUERY, KEY, FAR, seen_ptr, real_ptr, ratio_ptr, logit_ptr,
    heads, kv_heads, maps, slots, scale, cap, C: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """y of the new token for the heads of one key map; grid (B K, blocks of COLUMNS values)."""
    b, m = tl.program_id(0) // maps, tl.program_id(0) % maps
    g = m * kv_heads // maps
    seen = tl.load(seen_ptr + b).to(tl.int32)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, C.block_d)
    if exists(real_ptr, b):
        k = load_vector(K, b, g, C.dim, C.block_d)
        v = tl.load(place(V, b, g, 0) + e, mask=e < C.values, other=0.0).to(tl.float32)
        if C.kind == "linear":
            f, half = vector_features(k, KEY, m, C)
            absorb(FAR, tl.program_id(0), 0, f, v, e, C)
            if C.paired:
                absorb(FAR, tl.program_id(0), 1, half, v, e, C)
            tl.debug_barrier()
        else:
            i = tl.arange(0, RING)
            near_start = seen - C.window + 1
            if C.kind == "terrace":
                near_start = (seen // C.window - 1) * C.window
            near_start = tl.maximum(near_start, 0)
            back = (seen - 1 - i) % slots
            back = tl.where(back < 0, back + slots, back)
            held = seen - 1 - back
            visible = (i < slots) & (held >= near_start)
            visible = visible | ((i >= slots) & (i < slots + C.sinks) & (i - slots < near_start))
            ring_k = load_ring(K_RING, SINK_K, b, g, i, d, visible, slots, C.dim, C.block_d)
            ring_v = load_ring(V_RING, SINK_V, b, g, i, e, visible, slots, C.values, COLUMNS)
        for j in tl.static_range(SHARED):
            h = m * SHARED + j
            q = load_vector(Q, b, h, C.dim, C.block_d)
            num = tl.zeros([COLUMNS], tl.float32)
            den = 1e-12
            if C.kind != "linear":
                logit = 0.0
                if C.sink_logit:
                    logit = tl.load(logit_ptr + h)
                num, den = near_step(q, k, v, ring_k, ring_v, visible, logit, tl.load(ratio_ptr + h), scale, cap, C)
            if C.far:
                f, half = vector_features(q, QUERY, h, C)
                _at, s, z = load_slice(FAR, tl.program_id(0), 0, e, C)
                num += tl.sum(f[:, None] * s, 0)
                den += tl.sum(f * z, 0)
                if C.paired:
                    _at, s, z = load_slice(FAR, tl.program_id(0), 1, e, C)
                    num += tl.sum(half[:, None] * s, 0)
                    den += tl.sum(half * z, 0)
            tl.store(place(Y, b, h, 0) + e, (num / den).to(Y[0].dtype.element_ty), mask=e < C.values)
        if C.kind != "linear" and m * kv_heads % maps == 0:
            store_pair(V_RING, SINK_V, b, g, v, e, seen, slots, C.values, C)
            if tl.program_id(1) == 0:
                store_pair(K_RING, SINK_K, b, g, k, d, seen, slots, C.dim, C)


@torch.no_grad()
def decode(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    query: FusedMap | None,
    key: FusedMap | None,
    log_ratio_H: Tensor,
    state: StudentState,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """y [B, H, T, E] in q's dtype for a few tokens, updating `state` in place; a token with mask False changes nothing
    and gets 0.

    Raises:
        ValueError: what the kernels cannot do.
    """
    logit = None if sink_logit_H is None else sink_logit_H.float()
    ratio = log_ratio_H.detach().float() * 1.4426950408889634
    if not rule.far:
        query = key = None
    spans = Spans()
    call = Call(rule, q_BHTD, k_BGTD, v_BGTE, query, key, ratio, logit, None, None, None, spans)
    reason = refusal(call)
    if reason is None and rule.kind == "linear" and not rule.far:
        reason = "kind 'linear' has nothing to read with its far part off"
    if reason is not None:
        raise ValueError(f"impl is 'triton', but {reason}; `impl: chunkwise` can do it")
    y = torch.zeros(*q_BHTD.shape[:3], v_BGTE.shape[3], dtype=q_BHTD.dtype, device=q_BHTD.device)
    for t in range(q_BHTD.shape[2]):
        span = slice(t, t + 1)
        real = None if mask_BT is None else mask_BT[:, t].to(torch.int32)
        pieces = [x[:, :, span] for x in (q_BHTD, k_BGTD, v_BGTE, y)]
        _step(call, pieces, state, real)
        state.seen_B += 1 if real is None else real
    return y


def _step(call: Call, pieces: list[Tensor], state: StudentState, real: Tensor | None) -> None:
    rule = call.rule
    q = call.q
    far = (state.far_s_BKFE, state.far_z_BKF)
    rings = call.tensor(state.k_BGND), call.tensor(state.v_BGNE)
    none: tuple[Any, ...] = (None, 0, 0, 0)
    sinks = [call.tensor(x) if rule.sinks else none for x in (state.sink_k_BGSD, state.sink_v_BGSE)]
    if rule.kind != "linear" and call.key is not None:
        count = rule.window if rule.kind == "terrace" else 1
        run(
            fold_leaving, (q.shape[0] * call.maps,), call,
            *rings, call.operands(call.key), far, state.seen_B, real, call.maps, call.kv_heads, rule.slots,
            COUNT=count,
        )  # fmt: skip
    # without a far part the programs stand for key/value heads
    maps = call.kv_heads if call.key is None else call.maps
    values = call.v.shape[3]
    columns = block(values) if rule.kind == "linear" else min(block(values), VALUES_A_PROGRAM)
    whole = [(None, None, None) if m is None else (m.matrix, m.matrix, m.bias) for m in (call.query, call.key)]
    run(
        read_step, (q.shape[0] * maps, triton.cdiv(values, columns)), call,
        *(call.tensor(x) for x in pieces), *rings, *sinks, *whole, far, state.seen_B, real, call.log_ratio.exp2(),
        call.logit,
        call.heads, call.kv_heads, maps, rule.slots, *call.numbers(), SHARED=call.heads // maps, COLUMNS=columns,
        RING=block(rule.slots + rule.sinks),
    )  # fmt: skip
