"""The near part's backward pass as Triton kernels: window, sinks and sink logit.

The formulas are those of :mod:`trenchcoat.ops.triton.backward`, but chunks are independent here. Both kernels also add
the far part's gradients: du W^T to dq and dk, what `key_gradients` stored to dv. r is in dnum and dden here, not in the
weights (see `weights`).

Shape legend: as in :mod:`trenchcoat.ops.triton.parts`. A query's largest score is identified by a column: from 0 in the
chunk before, from `block_w` in its own, from 2 `block_w` for sinks, 4 `block_w` for the sink logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton.backward import load_dnum, load_row, row_gradient
from trenchcoat.ops.triton.maps import back_by_pieces, load_map
from trenchcoat.ops.triton.parts import (
    exponent_unit,
    lines,
    load_chunk,
    load_logit,
    load_sinks,
    load_tile,
    place,
    product,
    row_of,
    scores,
    seen_before,
    store_tile,
    tokens_of,
    weights,
    window_scores,
)


@triton.jit
def largest_score(before, own, sink, logit, C: tl.constexpr):
    """(largest score, its column); ties go to the last part, and there to the first column."""
    top, column = tl.max(own, 1), tl.argmax(own, 1) + C.block_w
    other = tl.max(before, 1)
    column = tl.where(other > top, tl.argmax(before, 1), column)
    top = tl.maximum(top, other)
    if C.sinks > 0:
        other = tl.max(sink, 1)
        column = tl.where(other > top, tl.argmax(sink, 1) + 2 * C.block_w, column)
        top = tl.maximum(top, other)
    if C.sink_logit:
        column = tl.where(logit > top, 4 * C.block_w, column)
        top = tl.maximum(top, logit)
    return top, column


@triton.jit
def gain(w, dnum, dden, v, C: tl.constexpr):
    """w dw of a block of keys: the loss gradient for the logarithm of each weight."""
    return w * (product(dnum, tl.trans(v), C.low, C) + dden[:, None])


@triton.jit
def score_gradient(ds, s, max_grad, at_top, scale, cap, C: tl.constexpr):
    """Gradients of q . k: w dw plus `max_grad` at the largest score, through soft-cap and scale."""
    ds += tl.where(at_top, max_grad[:, None], 0.0)
    if C.softcap:
        t = tl.maximum(s, -cap) / cap
        ds = ds * (1.0 - t * t)
    return ds * scale


@triton.jit
def chunk_query_gradient(
    dq, q, K, V, K_BOX, V_BOX, SINK_K, SINK_V, r, kv, start, logit, dnum, dden, c, length, position,
    dsink_k, dsink_v, scale, cap, C: tl.constexpr,
):  # fmt: skip
    """(dq including the near part, max_grad, column of the largest score, gradients so far of sinks and sink logit)."""
    unit = exponent_unit(scale, C)
    k, before_k, sink_k, s_before, s_own, s_sink, top = window_scores(
        q, K, K_BOX, SINK_K, r, kv, start, logit, c, length, position, scale, cap, C
    )
    top, column = largest_score(s_before, s_own, s_sink, logit, C)
    top = top * unit
    v = load_chunk(V, V_BOX, r, kv, start, c, length, C.values, C.block_e, C)
    own = gain(weights(s_own, unit, top), dnum, dden, v, C)
    before_v = load_chunk(V, V_BOX, r, kv, start, c - 1, length, C.values, C.block_e, C)
    past = gain(weights(s_before, unit, top), dnum, dden, before_v, C)
    max_grad = -tl.sum(own, 1) - tl.sum(past, 1)
    share = dden
    if C.sinks > 0:
        w_sink = weights(s_sink, unit, top)
        sink = gain(w_sink, dnum, dden, load_sinks(SINK_V, r, kv, C, C.values, C.block_e), C)
        max_grad -= tl.sum(sink, 1)
        dsink_v = product(tl.trans(w_sink), dnum, C.low, C, dsink_v)
    if C.sink_logit:
        share = tl.exp2(logit * unit - top) * dden
        max_grad -= share
    if not C.far:
        max_grad = max_grad * 0.0
    i = tl.arange(0, C.block_w)[None, :]
    at = column[:, None]
    dq = product(score_gradient(own, s_own, max_grad, at == i + C.block_w, scale, cap, C), k, C.low, C, dq)
    dq = product(score_gradient(past, s_before, max_grad, at == i, scale, cap, C), before_k, C.low, C, dq)
    if C.sinks > 0:
        n = tl.arange(0, C.block_s)[None, :]
        ds = score_gradient(sink, s_sink, max_grad, at == n + 2 * C.block_w, scale, cap, C)
        dq = product(ds, sink_k, C.low, C, dq)
        dsink_k = product(tl.trans(ds), q, C.low, C, dsink_k)
    if C.sink_logit:
        share += tl.where(column == 4 * C.block_w, max_grad, 0.0)
    return dq, max_grad, column, dsink_k, dsink_v, share


@triton.jit
def store_sinks(DSINK, mine, dsink_k, dsink_v, C: tl.constexpr):
    """Write this program's part of the sinks' gradients, [programs, S, D] and [programs, S, E]."""
    if C.sinks > 0:
        n = tl.arange(0, C.block_s)
        rows = (mine * C.sinks).to(tl.int64)
        store_tile(DSINK[0] + rows * C.dim, C.dim, n, n < C.sinks, dsink_k, C.dim, C.block_d)
        store_tile(DSINK[1] + rows * C.values, C.values, n, n < C.sinks, dsink_v, C.values, C.block_e)


@triton.jit
def through_map(dx, DU, r, h, start, token, ok, M, head, MAP, C: tl.constexpr):
    """`dx` plus du W^T of a chunk."""
    if C.piece == 0:
        du = load_tile(place(DU, r, h, start), DU[3], token, ok, C.columns, C.block_p)
        dx = product(du, tl.trans(MAP[0]), C.low, C, dx)
    else:
        dx = back_by_pieces(lines(DU, r, h, start, token), ok, M, head, dx, C)
    return dx


@triton.jit
def near_query_gradients(
    Q, K, V, Q_BOX, K_BOX, V_BOX, Y, DY, QUERY, DU, DEN, RESULT, DQ, share_ptr, DSINK,
    ratio_ptr, logit_ptr, SINK_K, SINK_V, ROWS, heads, kv_heads, maps, span, scale, cap, C: tl.constexpr,
):  # fmt: skip
    """dq, and this program's part of the sinks' gradients; grid (R H, groups).

    RESULT = (dden, max_grad, column of the largest score), [R, H, T]: dden is an input if there is a far part, the
    others are for `near_key_gradients`. `share_ptr`: gradient of the sink logit, [R H, groups].
    """
    r, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = tl.program_id(1)
    mine = tl.program_id(0) * tl.num_programs(1) + group
    start, length, first = row_of(ROWS, r, C)
    kv = h * kv_heads // heads
    ratio, logit, dlogit = tl.exp2(tl.load(ratio_ptr + h)), load_logit(logit_ptr, h, exponent_unit(scale, C), C), 0.0
    if C.far:
        query_map = load_map(QUERY, h, C)
    dsink_k, dsink_v = tl.zeros([C.block_s, C.block_d], tl.float32), tl.zeros([C.block_s, C.block_e], tl.float32)
    for c in range(group * span, tl.minimum(group * span + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        dq = tl.zeros([C.block_w, C.block_d], tl.float32)
        if C.far:
            dq = through_map(dq, DU, r, h, start, token, ok, QUERY, h, query_map, C)
        if C.kind != "linear":
            if C.far:
                dnum = load_dnum(DY, DEN, ratio, r, h, start, token, ok, C, False)
                dden = load_row(RESULT[0], r, h, start, token, ok, 0.0) * ratio
            else:
                dnum = load_dnum(DY, DEN, 1.0, r, h, start, token, ok, C, False)
                dden = row_gradient(dnum, Y, RESULT[0], r, h, start, token, ok, C) * ratio
                dnum = dnum * ratio
            q = load_chunk(Q, Q_BOX, r, h, start, c, length, C.dim, C.block_d, C)
            dq, max_grad, column, dsink_k, dsink_v, share = chunk_query_gradient(
                dq, q, K, V, K_BOX, V_BOX, SINK_K, SINK_V, r, kv, start, logit, dnum, dden, c, length,
                first + token, dsink_k, dsink_v, scale, cap, C,
            )  # fmt: skip
            tl.store(place(RESULT[1], r, h, start) + token, max_grad, mask=ok)
            tl.store(place(RESULT[2], r, h, start) + token, column, mask=ok)
            if C.sink_logit:
                dlogit += tl.sum(tl.where(ok, share, 0.0), 0)
        store_tile(place(DQ, r, h, start), DQ[3], token, ok, dq, C.dim, C.block_d)
    tl.store(share_ptr + mine, dlogit)
    store_sinks(DSINK, mine, dsink_k, dsink_v, C)


@triton.jit
def chunk_key_gradient(
    dk, dv, Q, k, v, seen, DY, DEN, TOP, RESULT, r, h, start, token, ok, column, ratio, scale, cap, C: tl.constexpr
):  # fmt: skip
    """Adds the gradients that the queries of one chunk contribute to the keys and values of another (or the same)."""
    q = load_tile(place(Q, r, h, start), Q[3], token, ok, C.dim, C.block_d)
    s = scores(q, k, seen, scale, cap, C)
    w = weights(s, exponent_unit(scale, C), load_row(TOP, r, h, start, token, ok, 0.0))
    dnum = load_dnum(DY, DEN, ratio, r, h, start, token, ok, C, False)
    dv = product(tl.trans(w), dnum, C.low, C, dv)
    dden = load_row(RESULT[0], r, h, start, token, ok, 0.0) * ratio
    max_grad = load_row(RESULT[1], r, h, start, token, ok, 0.0)
    at = load_row(RESULT[2], r, h, start, token, ok, -1)
    ds = score_gradient(gain(w, dnum, dden, v, C), s, max_grad, at[:, None] == column, scale, cap, C)
    return product(tl.trans(ds), q, C.low, C, dk), dv


@triton.jit
def near_key_gradients(
    Q, K, V, DY, KEY, DU, DEN, TOP, RESULT, FAR_DV, DK, DV, chunks,
    ratio_ptr, logit_ptr, SINK_K, SINK_V, ROWS, heads, kv_heads, maps, span, scale, cap, C: tl.constexpr,
):  # fmt: skip
    """dk and dv of one chunk of one key/value head, from all its query heads; grid (R G chunks)."""
    head, c = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    r, kv = head // kv_heads, head % kv_heads
    start, length, _first = row_of(ROWS, r, C)
    token, ok = tokens_of(c, length, C)
    dk, dv = tl.zeros([C.block_w, C.block_d], tl.float32), tl.zeros([C.block_w, C.block_e], tl.float32)
    if C.far:
        for j in range(0, maps // kv_heads):
            m = kv * (maps // kv_heads) + j
            dk = through_map(dk, DU, r, m, start, token, ok, KEY, m, load_map(KEY, m, C), C)
            far_dv = load_tile(place(FAR_DV, r, m, start), FAR_DV[3], token, ok, C.values, C.block_e)
            dv += far_dv.to(tl.float32)
    if C.kind != "linear":
        after, after_ok = tokens_of(c + 1, length, C)
        k = load_tile(place(K, r, kv, start), K[3], token, ok, C.dim, C.block_d)
        v = load_tile(place(V, r, kv, start), V[3], token, ok, C.values, C.block_e)
        i = tl.arange(0, C.block_w)
        for j in range(0, heads // kv_heads):
            h = kv * (heads // kv_heads) + j
            ratio = tl.exp2(tl.load(ratio_ptr + h))
            dk, dv = chunk_key_gradient(
                dk, dv, Q, k, v, i[None, :] <= i[:, None], DY, DEN, TOP, RESULT, r, h, start, token, ok,
                i[None, :] + C.block_w, ratio, scale, cap, C,
            )  # fmt: skip
            dk, dv = chunk_key_gradient(
                dk, dv, Q, k, v, seen_before(c + 1, C), DY, DEN, TOP, RESULT, r, h, start, after, after_ok, i[None, :],
                ratio, scale, cap, C,
            )  # fmt: skip
    store_tile(place(DK, r, kv, start), DK[3], token, ok, dk, C.dim, C.block_d)
    store_tile(place(DV, r, kv, start), DV[3], token, ok, dv, C.values, C.block_e)
