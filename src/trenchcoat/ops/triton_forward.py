"""The forward pass as Triton kernels: far sums of chunk groups, their running totals, outputs.

A row's chunks are cut into groups that run side by side (one group when there are rows and heads enough). `far_sums`
adds up each group's phi(k)^T v, `running_totals` makes of them what each group starts from, and `outputs` walks through
a group with the sums on chip. Features never reach memory.

Shape legend: as in :mod:`trenchcoat.ops.triton_parts`; R rows, H query heads, K key maps, G key/value heads. `lag`: the
sums a chunk reads end that many chunks before it (2; 1 for kind linear).
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton_parts import (
    far_read,
    features,
    load_map,
    load_sinks,
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
    window_read,
    window_scores,
)


@triton.jit
def fold(s1, s2, z1, z2, f, g, v, C: tl.constexpr):
    """Add a chunk's phi(k)^T v and phi(k)."""
    s1 += product(tl.trans(f), v, C.low, C)
    z1 += tl.sum(rounded(f, C), 0)
    if C.paired:
        s2 += product(tl.trans(g), v, C.low, C)
        z2 += tl.sum(rounded(g, C), 0)
    return s1, s2, z1, z2


@triton.jit
def far_sums(K, V, KEY, OUT, ROWS, maps, kv_heads, span, shift, C: tl.constexpr):
    """Sums of the chunks [group span - shift, ... + span) of a row, for one key map; grid (R K, groups)."""
    r = tl.program_id(0) // maps
    m = tl.program_id(0) % maps
    group = tl.program_id(1)
    start, length, first = row_of(ROWS, r, C)
    k_base = place(K, r, m * kv_heads // maps, start)
    v_base = place(V, r, m * kv_heads // maps, start)
    matrix, remainder, bias = load_map(KEY, m, C)
    s1 = tl.zeros([C.block_p, C.block_e], tl.float32)
    z1 = tl.zeros([C.block_p], tl.float32)
    s2 = tl.zeros([C.block_p, C.block_e], tl.float32)
    z2 = tl.zeros([C.block_p], tl.float32)
    last = tl.minimum(group * span - shift + span, tl.cdiv(length, C.window))
    for c in range(tl.maximum(group * span - shift, 0), last):
        token, ok = tokens_of(c, length, C)
        k = load_tile(k_base, K[3], token, ok, C.dim, C.block_d)
        v = load_tile(v_base, V[3], token, ok, C.values, C.block_e)
        f, g = features(k, matrix, remainder, bias, ok & (first + token >= C.sinks), C)
        s1, s2, z1, z2 = fold(s1, s2, z1, z2, f, g, v, C)
    store_sums(OUT, tl.program_id(0) * tl.num_programs(1) + group, s1, s2, z1, z2, C)


@triton.jit
def running_totals(x_ptr, start_ptr, groups, size, BACKWARDS: tl.constexpr, BLOCK: tl.constexpr):
    """x [rows, groups, size] in place: entry i becomes start + the entries before it (backwards: after it)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    total = tl.zeros([BLOCK], tl.float32)
    if start_ptr is not None:
        total = tl.load(start_ptr + row * size + at, mask=ok, other=0.0)
    for i in range(0, groups):
        group = i
        if BACKWARDS:
            group = groups - 1 - i
        entry = x_ptr + (row * groups + group) * size + at
        own = tl.load(entry, mask=ok, other=0.0)
        tl.store(entry, total, mask=ok)
        total += own


@triton.jit
def far_chunk(k, v, ok, before_k, before_v, before_ok, KIND: tl.constexpr):
    """The chunk that joins the sums after this one was read: the one before, or (linear) the own."""
    if KIND == "linear":
        return k, v, ok
    else:
        return before_k, before_v, before_ok


@triton.jit
def far_token(token, before, KIND: tl.constexpr):
    """Token numbers of `far_chunk`."""
    if KIND == "linear":
        return token
    else:
        return before


@triton.jit
def near_chunk(
    q, k, v, before_k, before_v, SINK_K, SINK_V, r, kv, logit, ratio, c, position, scale, cap, C: tl.constexpr
):  # fmt: skip
    """(numerator, denominator, largest score) of the near part of a chunk's queries."""
    sink_k, sink_v = k, v
    if C.sinks > 0:
        sink_k = load_sinks(SINK_K, r, kv, C, C.dim, C.block_d)
        sink_v = load_sinks(SINK_V, r, kv, C, C.values, C.block_e)
    s_before, s_own, s_sink, top = window_scores(q, k, before_k, sink_k, logit, c, position, scale, cap, C)
    num, den = window_read(s_before, s_own, s_sink, logit, top, ratio, v, before_v, sink_v, C)
    return num, den, top


@triton.jit
def outputs(
    Q, K, V, Y, QUERY, KEY, START, SAVED, ratio_ptr, logit_ptr, SINK_K, SINK_V, ROWS,
    heads, kv_heads, maps, span, scale, cap, C: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y of one group of chunks; grid (R H, groups). SAVED = (denominators, largest scores), float32 [R, H, T]."""
    r = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    group = tl.program_id(1)
    start, length, first = row_of(ROWS, r, C)
    q_base, y_base = place(Q, r, h, start), place(Y, r, h, start)
    k_base, v_base = place(K, r, h * kv_heads // heads, start), place(V, r, h * kv_heads // heads, start)
    m = h * maps // heads
    ratio, logit = tl.load(ratio_ptr + h), 0.0
    if C.sink_logit:
        logit = tl.load(logit_ptr + h)
    if C.far:
        q_matrix, q_remainder, q_bias = load_map(QUERY, h, C)
        k_matrix, k_remainder, k_bias = load_map(KEY, m, C)
        s1, s2, z1, z2 = load_sums(START, (r * maps + m) * tl.num_programs(1) + group, C)
    for c in range(group * span, tl.minimum(group * span + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        before, before_ok = tokens_of(c - 1, length, C)
        q = load_tile(q_base, Q[3], token, ok, C.dim, C.block_d)
        k = load_tile(k_base, K[3], token, ok, C.dim, C.block_d)
        v = load_tile(v_base, V[3], token, ok, C.values, C.block_e)
        before_k, before_v = k, v
        num = tl.zeros([C.block_w, C.block_e], tl.float32)
        den = tl.zeros([C.block_w], tl.float32) + 1e-12
        top = den
        if C.kind != "linear":
            before_k = load_tile(k_base, K[3], before, before_ok, C.dim, C.block_d)
            before_v = load_tile(v_base, V[3], before, before_ok, C.values, C.block_e)
            kv = h * kv_heads // heads
            num, den, top = near_chunk(
                q, k, v, before_k, before_v, SINK_K, SINK_V, r, kv, logit, ratio, c, first + token, scale, cap, C
            )
        if C.far:
            far_k, far_v, far_ok = far_chunk(k, v, ok, before_k, before_v, before_ok, C.kind)
            far_ok = far_ok & (first + far_token(token, before, C.kind) >= C.sinks)
            fq, gq = features(q, q_matrix, q_remainder, q_bias, ok, C)
            far_num, far_den = far_read(fq, gq, s1, s2, z1, z2, C)
            num, den = num + far_num, den + far_den
            if C.kind == "terrace":
                store_tile(y_base, Y[3], token, ok, num / den[:, None], C.values, C.block_e)
            fk, gk = features(far_k, k_matrix, k_remainder, k_bias, far_ok, C)
            if C.kind != "terrace":
                local = overlap(fq, gq, fk, gk, C)
                num += product(local, far_v, C.low, C)
                den += tl.sum(local, 1)
            s1, s2, z1, z2 = fold(s1, s2, z1, z2, fk, gk, far_v, C)
        if C.kind != "terrace" or not C.far:
            store_tile(y_base, Y[3], token, ok, num / den[:, None], C.values, C.block_e)
        if SAVE:
            at = (place(SAVED[0], r, h, start) + token, place(SAVED[1], r, h, start) + token)
            tl.store(at[0], den, mask=ok)
            tl.store(at[1], top, mask=ok)
