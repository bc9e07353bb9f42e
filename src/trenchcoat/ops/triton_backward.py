"""The backward pass as Triton kernels; everything but denominators and largest scores is computed again.

With w_nj = r exp(s_nj - c_n), dnum = dy / den and dden = -dnum . y: dw_nj = dnum . v_j + dden, ds = w dw, and the
largest score also gets `pull`, the sum of dphi(q) phi(q) over features, because c_n does not cancel: y does not change
when numerator and denominator grow alike, so the near part's sum of w dw is minus the far part's.

`query_gradients` walks forward with the far sums on chip, `gradient_sums` adds up phi(q)^T dnum by group, and
`key_gradients` walks backward with these. Keys shared by several heads get one gradient a head, added up afterwards.

Shape legend: as in :mod:`trenchcoat.ops.triton_parts`. A query's largest score is named by a column: 0 and up in the
chunk before, `block_w` and up in its own, 2 `block_w` and up for sinks, 4 `block_w` for the sink logit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton_forward import far_chunk, far_token, fold
from trenchcoat.ops.triton_parts import (
    far_read,
    features,
    features_backward,
    load_map,
    load_sinks,
    load_sums,
    load_tile,
    overlap,
    place,
    product,
    rounded,
    row_of,
    scores,
    seen_before,
    store_map,
    store_sums,
    store_tile,
    tokens_of,
    window_scores,
)


@triton.jit
def load_row(X, r, h, start, token, ok, OTHER: tl.constexpr):
    """One number a token, `OTHER` where there is none."""
    return tl.load(place(X, r, h, start) + token, mask=ok, other=OTHER)


@triton.jit
def load_dnum(DY, DEN, r, h, start, token, ok, C: tl.constexpr, GIVEN: tl.constexpr):
    """dy / den, [W, E]; with GIVEN the tensor holds that already."""
    dy = load_tile(place(DY, r, h, start), DY[3], token, ok, C.values, C.block_e).to(tl.float32)
    if not GIVEN:
        dy = dy / load_row(DEN, r, h, start, token, ok, 1.0)[:, None]
    return dy


@triton.jit
def unbend(ds, s, cap, C: tl.constexpr):
    """Through the soft-cap, from the capped scores s."""
    if C.softcap:
        t = tl.maximum(s, -cap) / cap
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def largest(before, own, sink, logit, C: tl.constexpr):
    """(largest score, its column); of equal ones the last part's first."""
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
def score_gradient(s, top, ratio, dnum, dden, v, pull, at_top, cap, C: tl.constexpr):
    """(weights w, gradients of the scores before soft-cap and scale) of a block of keys."""
    w = ratio * tl.exp(s - top[:, None])
    ds = w * (product(dnum, tl.trans(v), C.low, C) + dden[:, None])
    ds += tl.where(at_top, pull[:, None], 0.0)
    return w, unbend(ds, s, cap, C)


@triton.jit
def query_feature_gradient(s1, s2, z1, z2, dnum, dden, C: tl.constexpr):
    """Gradients of phi(q), both halves, from the keys in the sums."""
    df = product(dnum, tl.trans(s1), C.low, C) + dden[:, None] * z1[None, :]
    dg = df
    if C.paired:
        dg = product(dnum, tl.trans(s2), C.low, C) + dden[:, None] * z2[None, :]
    return df, dg


@triton.jit
def local_query_gradient(df, dg, fk, gk, far_v, dnum, dden, C: tl.constexpr):
    """Adds what far keys of :func:`overlap` give."""
    i = tl.arange(0, C.block_w)
    dx = product(dnum, tl.trans(far_v), C.low, C) + dden[:, None]
    dx = tl.where(i[None, :] <= i[:, None], dx, 0.0)
    df += product(dx, fk, C.low, C)
    if C.paired:
        dg += product(dx, gk, C.low, C)
    return df, dg


@triton.jit
def pull_of(f, g, df, dg, C: tl.constexpr):
    """Sum over features of dphi(q) phi(q)."""
    pull = tl.sum(df * rounded(f, C), 1)
    if C.paired:
        pull += tl.sum(dg * rounded(g, C), 1)
    return pull


@triton.jit
def near_query_gradient(
    q, k, v, before_k, before_v, SINK_K, SINK_V, r, kv, logit, ratio, dnum, dden, pull, c, position,
    dsink_k, dsink_v, scale, cap, C: tl.constexpr,
):  # fmt: skip
    """(dq, column of the largest score, gradients of the sinks so far, of the sink logit by query)."""
    sink_k, sink_v = k, v
    if C.sinks > 0:
        sink_k = load_sinks(SINK_K, r, kv, C, C.dim, C.block_d)
        sink_v = load_sinks(SINK_V, r, kv, C, C.values, C.block_e)
    s_before, s_own, s_sink, top = window_scores(q, k, before_k, sink_k, logit, c, position, scale, cap, C)
    top, column = largest(s_before, s_own, s_sink, logit, C)
    i = tl.arange(0, C.block_w)[None, :]
    at = column[:, None]
    w, ds = score_gradient(s_own, top, ratio, dnum, dden, v, pull, at == i + C.block_w, cap, C)
    dq = product(ds, k, C.low, C)
    w, ds = score_gradient(s_before, top, ratio, dnum, dden, before_v, pull, at == i, cap, C)
    dq += product(ds, before_k, C.low, C)
    if C.sinks > 0:
        n = tl.arange(0, C.block_s)[None, :]
        w, ds = score_gradient(s_sink, top, ratio, dnum, dden, sink_v, pull, at == n + 2 * C.block_w, cap, C)
        dq += product(ds, sink_k, C.low, C)
        dsink_k += product(tl.trans(ds), q, C.low, C) * scale
        dsink_v += product(tl.trans(w), dnum, C.low, C)
    share = dden
    if C.sink_logit:
        share = ratio * tl.exp(logit - top) * dden + tl.where(column == 4 * C.block_w, pull, 0.0)
    return dq * scale, column, dsink_k, dsink_v, share


@triton.jit
def store_sinks(DSINK, mine, dsink_k, dsink_v, C: tl.constexpr):
    """This program's share of the sinks' gradients, [programs, S, D] and [programs, S, E]."""
    if C.sinks > 0:
        n = tl.arange(0, C.block_s)
        rows = (mine * C.sinks).to(tl.int64)
        store_tile(DSINK[0] + rows * C.dim, C.dim, n, n < C.sinks, dsink_k, C.dim, C.block_d)
        store_tile(DSINK[1] + rows * C.values, C.values, n, n < C.sinks, dsink_v, C.values, C.block_e)


@triton.jit
def query_gradients(
    Q, K, V, Y, DY, QUERY, KEY, START, DEN, RESULT, DQ, DMAP, DHEAD, DSINK,
    ratio_ptr, logit_ptr, SINK_K, SINK_V, ROWS, heads, kv_heads, maps, span, scale, cap, C: tl.constexpr,
):  # fmt: skip
    """dq, this program's share of the query map's, mix's, sinks' gradients; grid (R H, groups).

    RESULT = (dden, pull, column of the largest score), [R, H, T], for `key_gradients`; DHEAD = (of log r, of the sink
    logit), [R H, groups].
    """
    r, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = tl.program_id(1)
    mine = tl.program_id(0) * tl.num_programs(1) + group
    start, length, first = row_of(ROWS, r, C)
    kv = h * kv_heads // heads
    k_base, v_base = place(K, r, kv, start), place(V, r, kv, start)
    ratio, logit, dlog, dlogit = tl.load(ratio_ptr + h), 0.0, 0.0, 0.0
    if C.sink_logit:
        logit = tl.load(logit_ptr + h)
    if C.far:
        q_matrix, q_remainder, q_bias = load_map(QUERY, h, C)
        k_matrix, k_remainder, k_bias = load_map(KEY, h * maps // heads, C)
        s1, s2, z1, z2 = load_sums(START, (r * maps + h * maps // heads) * tl.num_programs(1) + group, C)
        dmatrix, dbias = tl.zeros([C.block_d, C.block_p], tl.float32), tl.zeros([C.block_p], tl.float32)
    dsink_k, dsink_v = tl.zeros([C.block_s, C.block_d], tl.float32), tl.zeros([C.block_s, C.block_e], tl.float32)
    for c in range(group * span, tl.minimum(group * span + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        before, before_ok = tokens_of(c - 1, length, C)
        q = load_tile(place(Q, r, h, start), Q[3], token, ok, C.dim, C.block_d)
        k = load_tile(k_base, K[3], token, ok, C.dim, C.block_d)
        v = load_tile(v_base, V[3], token, ok, C.values, C.block_e)
        before_k = load_tile(k_base, K[3], before, before_ok, C.dim, C.block_d)
        before_v = load_tile(v_base, V[3], before, before_ok, C.values, C.block_e)
        y = load_tile(place(Y, r, h, start), Y[3], token, ok, C.values, C.block_e).to(tl.float32)
        dnum = load_dnum(DY, DEN, r, h, start, token, ok, C, False)
        dden = -tl.sum(dnum * y, 1)
        dq = tl.zeros([C.block_w, C.block_d], tl.float32)
        pull = tl.zeros([C.block_w], tl.float32)
        if C.far:
            far_k, far_v, far_ok = far_chunk(k, v, ok, before_k, before_v, before_ok, C.kind)
            far_ok = far_ok & (first + far_token(token, before, C.kind) >= C.sinks)
            fq, gq = features(q, q_matrix, q_remainder, q_bias, ok, C)
            fk, gk = features(far_k, k_matrix, k_remainder, k_bias, far_ok, C)
            df, dg = query_feature_gradient(s1, s2, z1, z2, dnum, dden, C)
            if C.kind != "terrace":
                df, dg = local_query_gradient(df, dg, fk, gk, far_v, dnum, dden, C)
            pull = pull_of(fq, gq, df, dg, C)
            du = features_backward(fq, gq, df, dg, C)
            dmatrix += product(tl.trans(q), du, C.low, C)
            dbias += tl.sum(du, 0)
            dq += product(du, tl.trans(q_matrix), C.low, C)
            s1, s2, z1, z2 = fold(s1, s2, z1, z2, fk, gk, far_v, C)
            dlog -= tl.sum(pull, 0)
        column = tl.zeros([C.block_w], tl.int32)
        if C.kind != "linear":
            near_dq, column, dsink_k, dsink_v, share = near_query_gradient(
                q, k, v, before_k, before_v, SINK_K, SINK_V, r, kv, logit, ratio, dnum, dden, pull, c, first + token,
                dsink_k, dsink_v, scale, cap, C,
            )  # fmt: skip
            dq += near_dq
            if C.sink_logit:
                dlogit += tl.sum(tl.where(ok, share, 0.0), 0)
        store_tile(place(DQ, r, h, start), DQ[3], token, ok, dq, C.dim, C.block_d)
        tl.store(place(RESULT[0], r, h, start) + token, dden, mask=ok)
        tl.store(place(RESULT[1], r, h, start) + token, pull, mask=ok)
        tl.store(place(RESULT[2], r, h, start) + token, column, mask=ok)
    tl.store(DHEAD[0] + mine, dlog)
    tl.store(DHEAD[1] + mine, dlogit)
    if C.far:
        store_map(DMAP, mine, dmatrix, dbias, C)
    store_sinks(DSINK, mine, dsink_k, dsink_v, C)


@triton.jit
def fold_gradient(s1, s2, z1, z2, f, g, dnum, dden, C: tl.constexpr):
    """Add a chunk's phi(q)^T dnum and phi(q)^T dden."""
    s1 += product(tl.trans(f), dnum, C.low, C)
    z1 += tl.sum(rounded(f, C) * dden[:, None], 0)
    if C.paired:
        s2 += product(tl.trans(g), dnum, C.low, C)
        z2 += tl.sum(rounded(g, C) * dden[:, None], 0)
    return s1, s2, z1, z2


@triton.jit
def gradient_sums(
    Q, DY, QUERY, DEN, DDEN, OUT, ROWS, heads, span, shift, C: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """Gradients of the far sums by the chunks [group span + shift, ... + span); grid (R H, groups)."""
    r, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = tl.program_id(1)
    start, length, _first = row_of(ROWS, r, C)
    matrix, remainder, bias = load_map(QUERY, h, C)
    s1, z1 = tl.zeros([C.block_p, C.block_e], tl.float32), tl.zeros([C.block_p], tl.float32)
    s2, z2 = tl.zeros([C.block_p, C.block_e], tl.float32), tl.zeros([C.block_p], tl.float32)
    begin = group * span + shift
    for c in range(begin, tl.minimum(begin + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        q = load_tile(place(Q, r, h, start), Q[3], token, ok, C.dim, C.block_d)
        dnum = load_dnum(DY, DEN, r, h, start, token, ok, C, GIVEN)
        dden = load_row(DDEN, r, h, start, token, ok, 0.0)
        f, g = features(q, matrix, remainder, bias, ok, C)
        s1, s2, z1, z2 = fold_gradient(s1, s2, z1, z2, f, g, dnum, dden, C)
    store_sums(OUT, tl.program_id(0) * tl.num_programs(1) + group, s1, s2, z1, z2, C)


@triton.jit
def near_key_gradient(
    dk, dv, q, k, v, s, DY, DEN, TOP, RESULT, r, h, start, token, ok, column, ratio, scale, cap, C: tl.constexpr
):  # fmt: skip
    """Adds what the queries of one chunk give to the keys and values of another (or the same)."""
    dnum = load_dnum(DY, DEN, r, h, start, token, ok, C, False)
    dden = load_row(RESULT[0], r, h, start, token, ok, 0.0)
    pull = load_row(RESULT[1], r, h, start, token, ok, 0.0)
    at = load_row(RESULT[2], r, h, start, token, ok, -1)
    top = load_row(TOP, r, h, start, token, ok, 0.0)
    w, ds = score_gradient(s, top, ratio, dnum, dden, v, pull, at[:, None] == column, cap, C)
    w = tl.where(ok[:, None], w, 0.0)
    dv += product(tl.trans(w), dnum, C.low, C)
    dk += product(tl.trans(ds), q, C.low, C) * scale
    return dk, dv


@triton.jit
def key_gradients(
    Q, K, V, DY, QUERY, KEY, ENDS, DEN, TOP, RESULT, DK, DV, DMAP,
    ratio_ptr, logit_ptr, SINK_K, SINK_V, ROWS, heads, kv_heads, maps, span, scale, cap,
    C: tl.constexpr, INPUTS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """dk and dv of one head (with INPUTS), and this program's share of the key map's gradients; grid (R H, groups)."""
    r, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = tl.program_id(1)
    mine = tl.program_id(0) * tl.num_programs(1) + group
    start, length, first = row_of(ROWS, r, C)
    kv = h * kv_heads // heads
    ratio = tl.load(ratio_ptr + h)
    if C.far:
        q_matrix, q_remainder, q_bias = load_map(QUERY, h, C)
        k_matrix, k_remainder, k_bias = load_map(KEY, h * maps // heads, C)
        s1, s2, z1, z2 = load_sums(ENDS, mine, C)
        dmatrix, dbias = tl.zeros([C.block_d, C.block_p], tl.float32), tl.zeros([C.block_p], tl.float32)
    last = tl.minimum(group * span + span, tl.cdiv(length, C.window))
    for n in range(0, last - group * span):
        c = last - 1 - n
        token, ok = tokens_of(c, length, C)
        after, after_ok = tokens_of(c + 1, length, C)
        k = load_tile(place(K, r, kv, start), K[3], token, ok, C.dim, C.block_d)
        v = load_tile(place(V, r, kv, start), V[3], token, ok, C.values, C.block_e)
        dk, dv = tl.zeros([C.block_w, C.block_d], tl.float32), tl.zeros([C.block_w, C.block_e], tl.float32)
        i = tl.arange(0, C.block_w)
        if INPUTS and C.kind != "linear":
            q = load_tile(place(Q, r, h, start), Q[3], token, ok, C.dim, C.block_d)
            s = scores(q, k, i[None, :] <= i[:, None], scale, cap, C)
            dk, dv = near_key_gradient(
                dk, dv, q, k, v, s, DY, DEN, TOP, RESULT, r, h, start, token, ok, i[None, :] + C.block_w,
                ratio, scale, cap, C,
            )  # fmt: skip
            q = load_tile(place(Q, r, h, start), Q[3], after, after_ok, C.dim, C.block_d)
            s = scores(q, k, seen_before(c + 1, C), scale, cap, C)
            dk, dv = near_key_gradient(
                dk, dv, q, k, v, s, DY, DEN, TOP, RESULT, r, h, start, after, after_ok, i[None, :],
                ratio, scale, cap, C,
            )  # fmt: skip
        if C.far:
            fk, gk = features(k, k_matrix, k_remainder, k_bias, ok & (first + token >= C.sinks), C)
            df, dg = query_feature_gradient(s1, s2, z1, z2, v, tl.zeros([C.block_w], tl.float32) + 1.0, C)
            if INPUTS:
                far_dv, _den = far_read(fk, gk, s1, s2, z1, z2, C)
                dv += far_dv
            seer = far_token(token, after, C.kind)
            seer_ok = (seer >= 0) & (seer < length) & (i < C.window)
            q = load_tile(place(Q, r, h, start), Q[3], seer, seer_ok, C.dim, C.block_d)
            dnum = load_dnum(DY, DEN, r, h, start, seer, seer_ok, C, GIVEN)
            dden = load_row(RESULT[0], r, h, start, seer, seer_ok, 0.0)
            fq, gq = features(q, q_matrix, q_remainder, q_bias, seer_ok, C)
            if C.kind != "terrace":
                dx = product(dnum, tl.trans(v), C.low, C) + dden[:, None]
                dx = tl.trans(tl.where(i[None, :] <= i[:, None], dx, 0.0))
                df += product(dx, fq, C.low, C)
                if C.paired:
                    dg += product(dx, gq, C.low, C)
                if INPUTS:
                    dv += product(tl.trans(overlap(fq, gq, fk, gk, C)), dnum, C.low, C)
            du = features_backward(fk, gk, df, dg, C)
            dmatrix += product(tl.trans(k), du, C.low, C)
            dbias += tl.sum(du, 0)
            if INPUTS:
                dk += product(du, tl.trans(k_matrix), C.low, C)
            s1, s2, z1, z2 = fold_gradient(s1, s2, z1, z2, fq, gq, dnum, dden, C)
        if INPUTS:
            store_tile(place(DK, r, h, start), DK[3], token, ok, dk, C.dim, C.block_d)
            store_tile(place(DV, r, h, start), DV[3], token, ok, dv, C.values, C.block_e)
    if C.far:
        store_map(DMAP, mine, dmatrix, dbias, C)
