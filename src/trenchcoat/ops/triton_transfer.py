"""Attention transfer as a Triton kernel: outputs, squared error and the query side's gradients in one pass.

The student's outputs are not stored. What is stored for the key side's pass
(:func:`trenchcoat.ops.triton_backward.key_gradients`) is dnum, the error over the denominator, and dden.

Shape legend: as in :mod:`trenchcoat.ops.triton_parts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton_backward import local_query_gradient, pull_of, query_feature_gradient
from trenchcoat.ops.triton_forward import far_chunk, far_token, fold, near_chunk
from trenchcoat.ops.triton_parts import (
    far_read,
    features,
    features_backward,
    load_map,
    load_sums,
    load_tile,
    overlap,
    place,
    product,
    row_of,
    store_map,
    store_tile,
    tokens_of,
)


@triton.jit
def transfer_outputs(
    Q, K, V, TEACHER, QUERY, KEY, START, DNUM, DDEN, SHARE, DMAP,
    ratio_ptr, logit_ptr, SINK_K, SINK_V, ROWS, heads, kv_heads, maps, span, scale, cap, weight,
    C: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """Squared error of one group of chunks and (LEARN) gradients of `weight` times it; grid (R H, groups).

    SHARE = (squared error, gradient of log r), [R H, groups]; DMAP as for :func:`store_map`.
    """
    r, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    group = tl.program_id(1)
    mine = tl.program_id(0) * tl.num_programs(1) + group
    start, length, first = row_of(ROWS, r, C)
    kv = h * kv_heads // heads
    k_base, v_base = place(K, r, kv, start), place(V, r, kv, start)
    ratio, logit, squares, dlog = tl.load(ratio_ptr + h), 0.0, 0.0, 0.0
    if C.sink_logit:
        logit = tl.load(logit_ptr + h)
    if C.far:
        q_matrix, q_remainder, q_bias = load_map(QUERY, h, C)
        k_matrix, k_remainder, k_bias = load_map(KEY, h * maps // heads, C)
        s1, s2, z1, z2 = load_sums(START, (r * maps + h * maps // heads) * tl.num_programs(1) + group, C)
        dmatrix, dbias = tl.zeros([C.block_d, C.block_p], tl.float32), tl.zeros([C.block_p], tl.float32)
    for c in range(group * span, tl.minimum(group * span + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        before, before_ok = tokens_of(c - 1, length, C)
        q = load_tile(place(Q, r, h, start), Q[3], token, ok, C.dim, C.block_d)
        k = load_tile(k_base, K[3], token, ok, C.dim, C.block_d)
        v = load_tile(v_base, V[3], token, ok, C.values, C.block_e)
        before_k = load_tile(k_base, K[3], before, before_ok, C.dim, C.block_d)
        before_v = load_tile(v_base, V[3], before, before_ok, C.values, C.block_e)
        num = tl.zeros([C.block_w, C.block_e], tl.float32)
        den = tl.zeros([C.block_w], tl.float32) + 1e-12
        if C.kind != "linear":
            num, den, _top = near_chunk(
                q, k, v, before_k, before_v, SINK_K, SINK_V, r, kv, logit, ratio, c, first + token, scale, cap, C
            )
        if C.far:
            far_k, far_v, far_ok = far_chunk(k, v, ok, before_k, before_v, before_ok, C.kind)
            far_ok = far_ok & (first + far_token(token, before, C.kind) >= C.sinks)
            fq, gq = features(q, q_matrix, q_remainder, q_bias, ok, C)
            fk, gk = features(far_k, k_matrix, k_remainder, k_bias, far_ok, C)
            far_num, far_den = far_read(fq, gq, s1, s2, z1, z2, C)
            num, den = num + far_num, den + far_den
            if C.kind != "terrace":
                local = overlap(fq, gq, fk, gk, C)
                num += product(local, far_v, C.low, C)
                den += tl.sum(local, 1)
        y = num / den[:, None]
        teacher = load_tile(place(TEACHER, r, h, start), TEACHER[3], token, ok, C.values, C.block_e)
        error = tl.where(ok[:, None], y - teacher.to(tl.float32), 0.0)
        squares += tl.sum(tl.sum(error * error, 1), 0)
        if C.far:
            if LEARN:
                dnum = (2.0 * weight) * error / den[:, None]
                dden = -tl.sum(dnum * y, 1)
                df, dg = query_feature_gradient(s1, s2, z1, z2, dnum, dden, C)
                if C.kind != "terrace":
                    df, dg = local_query_gradient(df, dg, fk, gk, far_v, dnum, dden, C)
                dlog -= tl.sum(pull_of(fq, gq, df, dg, C), 0)
                du = features_backward(fq, gq, df, dg, C)
                dmatrix += product(tl.trans(q), du, C.low, C)
                dbias += tl.sum(du, 0)
                store_tile(place(DNUM, r, h, start), DNUM[3], token, ok, dnum, C.values, C.block_e)
                tl.store(place(DDEN, r, h, start) + token, dden, mask=ok)
            s1, s2, z1, z2 = fold(s1, s2, z1, z2, fk, gk, far_v, C)
    tl.store(SHARE[0] + mine, squares)
    if C.far and LEARN:
        store_map(DMAP, mine, dmatrix, dbias, C)
        tl.store(SHARE[1] + mine, dlog)
