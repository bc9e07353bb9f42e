"""The backward pass as Triton kernels; everything but denominators and largest scores is recomputed.

With w_nj = r exp(s_nj - c_n), dnum = dy / den and dden = -dnum . y: dw_nj = dnum . v_j + dden and ds = w dw. The
largest score also gets `max_grad`, minus the sum of w dw over the near keys: c_n is part of the function, and adding a
constant to all scores of a query (c_n among them) changes nothing, so the gradients of its scores sum to zero.

Far part: `query_gradients` iterates forward with the far sums on chip, `gradient_sums` sums phi(q)^T dnum by group,
`key_gradients` iterates backward with these. They store du, the gradients before the activation, from which
`map_gradients` computes those of the maps. The near part's kernels (:mod:`trenchcoat.ops.triton.near`) then complete
dq, dk and dv. A program sums over the heads that share its keys or its map in a fixed order, so results are bitwise
reproducible.

Shape legend: as in :mod:`trenchcoat.ops.triton.parts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton.forward import far_chunk, fold
from trenchcoat.ops.triton.maps import features, features_backward, key_features, load_map, store_map
from trenchcoat.ops.triton.parts import (
    WIDTH,
    far_read,
    lines,
    load_chunk,
    load_sums,
    load_tile,
    overlap,
    place,
    product,
    rounded,
    row_of,
    store_sums,
    store_tile,
    tokens_of,
    zero_sums,
)


@triton.jit
def load_row(X, r, h, start, token, ok, OTHER: tl.constexpr):
    """One number per token, `OTHER` where there is no token."""
    return tl.load(place(X, r, h, start) + token, mask=ok, other=OTHER)


@triton.jit
def load_dnum(DY, DEN, times, r, h, start, token, ok, C: tl.constexpr, GIVEN: tl.constexpr):
    """`times` dy / den, [W, E]; with GIVEN the tensor holds dy / den already, and `times` must be 1."""
    dy = load_tile(place(DY, r, h, start), DY[3], token, ok, C.values, C.block_e).to(tl.float32)
    if not GIVEN:
        dy = dy * (times / load_row(DEN, r, h, start, token, ok, 1.0))[:, None]
    return dy


@triton.jit
def row_gradient(dnum, Y, DDEN, r, h, start, token, ok, C: tl.constexpr):
    """dden of a chunk, stored for later kernels."""
    y = load_tile(place(Y, r, h, start), Y[3], token, ok, C.values, C.block_e).to(tl.float32)
    dden = -tl.sum(dnum * y, 1)
    tl.store(place(DDEN, r, h, start) + token, dden, mask=ok)
    return dden


@triton.jit
def query_feature_gradient(s1, s2, z1, z2, dnum, dden, C: tl.constexpr):
    """Gradients of phi(q), both halves, from the keys in the sums."""
    df = product(dnum, tl.trans(s1), C.low, C) + dden[:, None] * tl.max(z1, 1)[None, :]
    dg = df
    if C.paired:
        dg = product(dnum, tl.trans(s2), C.low, C) + dden[:, None] * tl.max(z2, 1)[None, :]
    return df, dg


@triton.jit
def local_query_gradient(df, dg, fk, gk, far_v, far_ok, dnum, dden, C: tl.constexpr):
    """Adds the contribution of the far keys of :func:`overlap`."""
    i = tl.arange(0, C.block_w)
    dx = product(dnum, tl.trans(far_v), C.low, C) + dden[:, None]
    dx = tl.where((i[None, :] <= i[:, None]) & far_ok[None, :], dx, 0.0)
    df = product(dx, fk, C.low, C, df)
    if C.paired:
        dg = product(dx, gk, C.low, C, dg)
    return df, dg


@triton.jit
def store_gradient(DU, r, h, start, token, ok, f, g, df, dg, C: tl.constexpr):
    """Write du of a chunk, given the gradients of its features."""
    store_tile(place(DU, r, h, start), DU[3], token, ok, features_backward(f, g, df, dg, C), C.columns, C.block_p)


@triton.jit
def share_of_far(f, g, df, dg, C: tl.constexpr):
    """Sum of dphi(q) phi(q): the gradient for a common scale of the far part's weights."""
    total = tl.sum(df * rounded(f, C), 1)
    if C.paired:
        total += tl.sum(dg * rounded(g, C), 1)
    return tl.sum(total, 0)


@triton.jit
def query_gradients(
    Q, K, V, Q_BOX, K_BOX, V_BOX, Y, DY, QUERY, KEY, START, DEN, DDEN, DU, share_ptr, ROWS, heads, kv_heads, maps, span,
    C: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """du of the queries, dden (unless GIVEN), this program's part of the gradient of log r; grid (R H, groups)."""
    r, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = tl.program_id(1)
    start, length, first = row_of(ROWS, r, C)
    kv, m = h * kv_heads // heads, h * maps // heads
    query_map, key_map = load_map(QUERY, h, C), load_map(KEY, m, C)
    s1, s2, z1, z2 = load_sums(START, (r * maps + m) * tl.num_programs(1) + group, C)
    share = 0.0
    for c in range(group * span, tl.minimum(group * span + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        far, far_ok = tokens_of(far_chunk(c, C.kind), length, C)
        q = load_chunk(Q, Q_BOX, r, h, start, c, length, C.dim, C.block_d, C)
        fq, gq = features(q, lines(Q, r, h, start, token), ok, QUERY, h, query_map, C)
        dnum = load_dnum(DY, DEN, 1.0, r, h, start, token, ok, C, GIVEN)
        if GIVEN:
            dden = load_row(DDEN, r, h, start, token, ok, 0.0)
        else:
            dden = row_gradient(dnum, Y, DDEN, r, h, start, token, ok, C)
        df, dg = query_feature_gradient(s1, s2, z1, z2, dnum, dden, C)
        if C.kind == "terrace":
            share += share_of_far(fq, gq, df, dg, C)
            store_gradient(DU, r, h, start, token, ok, fq, gq, df, dg, C)
        far_k = load_chunk(K, K_BOX, r, kv, start, far_chunk(c, C.kind), length, C.dim, C.block_d, C)
        far_v = load_chunk(V, V_BOX, r, kv, start, far_chunk(c, C.kind), length, C.values, C.block_e, C)
        fk, gk = key_features(far_k, lines(K, r, kv, start, far), far_ok, first + far, KEY, m, key_map, C)
        if C.kind != "terrace":
            df, dg = local_query_gradient(df, dg, fk, gk, far_v, far_ok, dnum, dden, C)
            share += share_of_far(fq, gq, df, dg, C)
            store_gradient(DU, r, h, start, token, ok, fq, gq, df, dg, C)
        s1, s2, z1, z2 = fold(s1, s2, z1, z2, fk, gk, far_v, far_ok, C)
    tl.store(share_ptr + tl.program_id(0) * tl.num_programs(1) + group, -share)


@triton.jit
def fold_gradient(s1, s2, z1, z2, f, g, dnum, dden, C: tl.constexpr):
    """Add a chunk's phi(q)^T dnum and phi(q)^T dden."""
    ones = tl.zeros([C.block_w, WIDTH], tl.float32) + dden[:, None]
    upper = ones.to(C.low)
    s1 = product(tl.trans(f), dnum, C.low, C, s1)
    z1 = product(tl.trans(f), upper, C.low, C, z1)
    if C.paired:
        s2 = product(tl.trans(g), dnum, C.low, C, s2)
        z2 = product(tl.trans(g), upper, C.low, C, z2)
    if C.split:
        lower = ones - upper.to(tl.float32)
        z1 = product(tl.trans(f), lower, C.low, C, z1)
        if C.paired:
            z2 = product(tl.trans(g), lower, C.low, C, z2)
    return s1, s2, z1, z2


@triton.jit
def gradient_sums(
    Q, DY, QUERY, DEN, DDEN, OUT, ROWS, heads, maps, span, shift, C: tl.constexpr, SHARED: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of the far sums by the chunks [group span + shift, ... + span), of the SHARED heads of a key map; grid
    (R K, groups)."""
    r, m = tl.program_id(0) // maps, tl.program_id(0) % maps
    group = tl.program_id(1)
    start, length, _first = row_of(ROWS, r, C)
    s1, s2, z1, z2 = zero_sums(C)
    begin = group * span + shift
    for j in range(SHARED):
        h = m * SHARED + j
        query_map = load_map(QUERY, h, C)
        for c in range(begin, tl.minimum(begin + span, tl.cdiv(length, C.window))):
            token, ok = tokens_of(c, length, C)
            q = load_tile(place(Q, r, h, start), Q[3], token, ok, C.dim, C.block_d)
            f, g = features(q, lines(Q, r, h, start, token), ok, QUERY, h, query_map, C)
            dnum = load_dnum(DY, DEN, 1.0, r, h, start, token, ok, C, GIVEN)
            dden = load_row(DDEN, r, h, start, token, ok, 0.0)
            s1, s2, z1, z2 = fold_gradient(s1, s2, z1, z2, f, g, dnum, dden, C)
    store_sums(OUT, tl.program_id(0) * tl.num_programs(1) + group, s1, s2, z1, z2, C)


@triton.jit
def seeing_chunk(c, KIND: tl.constexpr):
    """The chunk of queries that is added to the gradient sums after chunk c has read them."""
    if KIND == "linear":
        return c
    else:
        return c + 1


@triton.jit
def key_gradients(
    Q, K, V, Q_BOX, K_BOX, V_BOX, DY, QUERY, KEY, ENDS, DEN, DDEN, DU, DV, ROWS, heads, kv_heads, maps, span,
    C: tl.constexpr, SHARED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """du of the keys under one key map and, unless DV[0] is None, dv by its heads' far queries; grid (R K, groups)."""
    r, m = tl.program_id(0) // maps, tl.program_id(0) % maps
    group = tl.program_id(1)
    start, length, first = row_of(ROWS, r, C)
    kv = m * kv_heads // maps
    key_map = load_map(KEY, m, C)
    s1, s2, z1, z2 = load_sums(ENDS, tl.program_id(0) * tl.num_programs(1) + group, C)
    i = tl.arange(0, C.block_w)
    last = tl.minimum(group * span + span, tl.cdiv(length, C.window))
    for n in range(0, last - group * span):
        c = last - 1 - n
        token, ok = tokens_of(c, length, C)
        seer, seer_ok = tokens_of(seeing_chunk(c, C.kind), length, C)
        k = load_chunk(K, K_BOX, r, kv, start, c, length, C.dim, C.block_d, C)
        v = load_chunk(V, V_BOX, r, kv, start, c, length, C.values, C.block_e, C)
        fk, gk = key_features(k, lines(K, r, kv, start, token), ok, first + token, KEY, m, key_map, C)
        df, dg = query_feature_gradient(s1, s2, z1, z2, v, tl.zeros([C.block_w], tl.float32) + 1.0, C)
        dv = tl.zeros([C.block_w, C.block_e], tl.float32)
        if C.kind == "terrace":
            store_gradient(DU, r, m, start, token, ok, fk, gk, df, dg, C)
        if DV[0] is not None:
            dv, _den = far_read(dv, fk, gk, s1, s2, z1, z2, C)
            if C.kind == "terrace":
                store_tile(place(DV, r, m, start), DV[3], token, ok, dv, C.values, C.block_e)
        for j in range(SHARED):
            h = m * SHARED + j
            query_map = load_map(QUERY, h, C)
            q = load_chunk(Q, Q_BOX, r, h, start, seeing_chunk(c, C.kind), length, C.dim, C.block_d, C)
            fq, gq = features(q, lines(Q, r, h, start, seer), seer_ok, QUERY, h, query_map, C)
            dnum = load_dnum(DY, DEN, 1.0, r, h, start, seer, seer_ok, C, GIVEN)
            dden = load_row(DDEN, r, h, start, seer, seer_ok, 0.0)
            if C.kind != "terrace":
                dx = product(dnum, tl.trans(v), C.low, C) + dden[:, None]
                dx = tl.trans(tl.where(i[None, :] <= i[:, None], dx, 0.0))
                df = product(dx, fq, C.low, C, df)
                if C.paired:
                    dg = product(dx, gq, C.low, C, dg)
                if DV[0] is not None:
                    dv = product(tl.trans(overlap(fq, gq, fk, gk, ok, C)), dnum, C.low, C, dv)
            s1, s2, z1, z2 = fold_gradient(s1, s2, z1, z2, fq, gq, dnum, dden, C)
        if C.kind != "terrace":
            store_gradient(DU, r, m, start, token, ok, fk, gk, df, dg, C)
            if DV[0] is not None:
                store_tile(place(DV, r, m, start), DV[3], token, ok, dv, C.values, C.block_e)


@triton.jit
def map_gradients(X, DU, GRADS, ROWS, heads, maps, span, C: tl.constexpr, BLOCK: tl.constexpr):
    """x^T du and the sum of du over a group of chunks, for BLOCK rows of one map; grid (R M, groups, blocks of rows). X
    has `heads` heads."""
    r, m = tl.program_id(0) // maps, tl.program_id(0) % maps
    group = tl.program_id(1)
    start, length, _first = row_of(ROWS, r, C)
    dmatrix, dbias = tl.zeros([BLOCK, C.block_p], tl.float32), tl.zeros([C.block_p], tl.float32)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    for c in range(group * span, tl.minimum(group * span + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        x = lines(X, r, m * heads // maps, start, token)
        x = tl.load(x[:, None] + d[None, :], mask=ok[:, None] & (d[None, :] < C.dim), other=0.0)
        du = load_tile(place(DU, r, m, start), DU[3], token, ok, C.columns, C.block_p)
        dmatrix = product(tl.trans(x), du, C.low, C, dmatrix)
        if C.bias:
            dbias += tl.sum(du.to(tl.float32), 0)
    store_map(GRADS, tl.program_id(0) * tl.num_programs(1) + group, d, dmatrix, dbias, C)
