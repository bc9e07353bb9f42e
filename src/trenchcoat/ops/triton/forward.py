"""The forward pass as Triton kernels: far sums of chunk groups, their running totals, outputs.

A row's chunks are split into groups that run in parallel (one group if there are enough rows and heads). `far_sums`
computes each group's sum of phi(k)^T v, `running_totals` turns these into the sums each group starts from, and
`outputs` iterates over a group with the sums on chip. Features are never written to memory. In attention transfer
`outputs` stores the error terms that the gradients need instead of y.

Shape legend: as in :mod:`trenchcoat.ops.triton.parts`; R rows, H query heads, K key maps, G key/value heads. `lag`: the
sums a chunk reads end this many chunks before it (2; 1 for kind linear).
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton.maps import features, key_features, load_map
from trenchcoat.ops.triton.parts import (
    exponent_unit,
    far_read,
    lines,
    load_chunk,
    load_logit,
    load_sinks,
    load_sums,
    load_tile,
    overlap,
    place,
    product,
    real_ones,
    row_of,
    store_sums,
    store_tile,
    tokens_of,
    weights,
    window_scores,
    zero_sums,
)


@triton.jit
def fold(s1, s2, z1, z2, f, g, v, ok, C: tl.constexpr):
    """Add a chunk's phi(k)^T v and phi(k)."""
    one = real_ones(ok, C)
    s1 = product(tl.trans(f), v, C.low, C, s1)
    z1 = product(tl.trans(f), one, C.low, C, z1)
    if C.paired:
        s2 = product(tl.trans(g), v, C.low, C, s2)
        z2 = product(tl.trans(g), one, C.low, C, z2)
    return s1, s2, z1, z2


@triton.jit
def far_sums(K, V, KEY, OUT, ROWS, maps, kv_heads, span, shift, C: tl.constexpr):
    """Sums of the chunks [group span - shift, ... + span) of a row, for one key map; grid (R K, groups)."""
    r = tl.program_id(0) // maps
    m = tl.program_id(0) % maps
    group = tl.program_id(1)
    start, length, first = row_of(ROWS, r, C)
    kv = m * kv_heads // maps
    key_map = load_map(KEY, m, C)
    s1, s2, z1, z2 = zero_sums(C)
    last = tl.minimum(group * span - shift + span, tl.cdiv(length, C.window))
    for c in range(tl.maximum(group * span - shift, 0), last):
        token, ok = tokens_of(c, length, C)
        k = load_tile(place(K, r, kv, start), K[3], token, ok, C.dim, C.block_d)
        v = load_tile(place(V, r, kv, start), V[3], token, ok, C.values, C.block_e)
        f, g = key_features(k, lines(K, r, kv, start, token), ok, first + token, KEY, m, key_map, C)
        s1, s2, z1, z2 = fold(s1, s2, z1, z2, f, g, v, ok, C)
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
def far_chunk(c, KIND: tl.constexpr):
    """The chunk that is added to the sums after chunk c was read: the one before, or (linear) c itself."""
    if KIND == "linear":
        return c
    else:
        return c - 1


@triton.jit
def near_read(
    num, q, K, V, K_BOX, V_BOX, SINK_K, SINK_V, r, kv, start, logit, ratio, c, length, position, scale, cap,
    C: tl.constexpr,
):  # fmt: skip
    """(numerator on top of `num`, denominator, largest score as an exponent of two) of the near part of a chunk."""
    unit = exponent_unit(scale, C)
    _k, _before_k, _sink_k, s_before, s_own, s_sink, top = window_scores(
        q, K, K_BOX, SINK_K, r, kv, start, logit, c, length, position, scale, cap, C
    )
    top = top * unit
    w_own, w_before = weights(s_own, unit, top), weights(s_before, unit, top)
    den = tl.sum(w_own, 1) + tl.sum(w_before, 1)
    v = load_chunk(V, V_BOX, r, kv, start, c, length, C.values, C.block_e, C)
    num = product(w_own, v, C.dot, C, num)
    before_v = load_chunk(V, V_BOX, r, kv, start, c - 1, length, C.values, C.block_e, C)
    num = product(w_before, before_v, C.dot, C, num)
    if C.sinks > 0:
        w_sink = weights(s_sink, unit, top)
        den += tl.sum(w_sink, 1)
        num = product(w_sink, load_sinks(SINK_V, r, kv, C, C.values, C.block_e), C.dot, C, num)
    if C.sink_logit:
        den += tl.exp2(logit * unit - top)
    return num * ratio, den * ratio, top


@triton.jit
def store_error(num, den, TEACHER, DNUM, DDEN, r, h, start, token, ok, weight, C: tl.constexpr, LEARN: tl.constexpr):
    """Squared error of a chunk; with LEARN, writes `weight` times its gradients for numerator and denominator."""
    inverse = 1.0 / den
    y = num * inverse[:, None]
    teacher = load_tile(place(TEACHER, r, h, start), TEACHER[3], token, ok, C.values, C.block_e)
    error = tl.where(ok[:, None], y - teacher.to(tl.float32), 0.0)
    if LEARN:
        dnum = error * (2.0 * weight * inverse)[:, None]
        store_tile(place(DNUM, r, h, start), DNUM[3], token, ok, dnum, C.values, C.block_e)
        tl.store(place(DDEN, r, h, start) + token, -tl.sum(dnum * y, 1), mask=ok)
    return tl.sum(tl.sum(error * error, 1), 0)


@triton.jit
def store_result(
    num, den, top, Y, SAVED, TEACHER, DNUM, DDEN, r, h, start, token, ok, weight, C: tl.constexpr, SAVE: tl.constexpr,
    LEARN: tl.constexpr,
):  # fmt: skip
    """Store a chunk's y, or with a teacher what :func:`store_error` does; the squared error (0 without a teacher)."""
    squares = 0.0
    if TEACHER[0] is not None:
        squares = store_error(num, den, TEACHER, DNUM, DDEN, r, h, start, token, ok, weight, C, LEARN)
    else:
        y = num * (1.0 / den)[:, None]
        store_tile(place(Y, r, h, start), Y[3], token, ok, y, C.values, C.block_e)
    if SAVE:
        tl.store(place(SAVED[0], r, h, start) + token, den, mask=ok)
        tl.store(place(SAVED[1], r, h, start) + token, top, mask=ok)
    return squares


@triton.jit
def outputs(
    Q, K, V, Q_BOX, K_BOX, V_BOX, Y, QUERY, KEY, START, SAVED, TEACHER, DNUM, DDEN, squares_ptr,
    ratio_ptr, logit_ptr, SINK_K, SINK_V, ROWS, heads, kv_heads, maps, span, scale, cap, weight,
    C: tl.constexpr, SAVE: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """One group of chunks; grid (R H, groups).

    SAVED = (denominators, largest scores as exponents of two), float32 [R, H, T]. With a teacher's y, the student's is
    not stored, but squared errors [R H, groups] and (LEARN) dnum and dden [R, H, T]. `ratio_ptr`: log2 r.
    """
    r = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    group = tl.program_id(1)
    start, length, first = row_of(ROWS, r, C)
    kv = h * kv_heads // heads
    m = h * maps // heads
    ratio, logit = tl.exp2(tl.load(ratio_ptr + h)), load_logit(logit_ptr, h, exponent_unit(scale, C), C)
    squares = 0.0
    if C.far:
        query_map, key_map = load_map(QUERY, h, C), load_map(KEY, m, C)
        s1, s2, z1, z2 = load_sums(START, (r * maps + m) * tl.num_programs(1) + group, C)
    for c in range(group * span, tl.minimum(group * span + span, tl.cdiv(length, C.window))):
        token, ok = tokens_of(c, length, C)
        q = load_chunk(Q, Q_BOX, r, h, start, c, length, C.dim, C.block_d, C)
        num = tl.zeros([C.block_w, C.block_e], tl.float32)
        den = tl.zeros([C.block_w], tl.float32) + 1e-12
        top = den
        if C.kind != "linear":
            num, near_den, top = near_read(
                num, q, K, V, K_BOX, V_BOX, SINK_K, SINK_V, r, kv, start, logit, ratio, c, length, first + token,
                scale, cap, C,
            )  # fmt: skip
            den += near_den
        if C.far:
            fq, gq = features(q, lines(Q, r, h, start, token), ok, QUERY, h, query_map, C)
            num, far_den = far_read(num, fq, gq, s1, s2, z1, z2, C)
            den += far_den
        if C.kind == "terrace" or not C.far:
            squares += store_result(
                num, den, top, Y, SAVED, TEACHER, DNUM, DDEN, r, h, start, token, ok, weight, C, SAVE, LEARN
            )
        if C.far:
            far, far_ok = tokens_of(far_chunk(c, C.kind), length, C)
            far_k = load_chunk(K, K_BOX, r, kv, start, far_chunk(c, C.kind), length, C.dim, C.block_d, C)
            far_v = load_chunk(V, V_BOX, r, kv, start, far_chunk(c, C.kind), length, C.values, C.block_e, C)
            fk, gk = key_features(far_k, lines(K, r, kv, start, far), far_ok, first + far, KEY, m, key_map, C)
            if C.kind != "terrace":
                local = overlap(fq, gq, fk, gk, far_ok, C)
                num = product(local, far_v, C.low, C, num)
                den += tl.sum(local, 1)
                squares += store_result(
                    num, den, top, Y, SAVED, TEACHER, DNUM, DDEN, r, h, start, token, ok, weight, C, SAVE, LEARN
                )
            s1, s2, z1, z2 = fold(s1, s2, z1, z2, fk, gk, far_v, far_ok, C)
    if TEACHER[0] is not None:
        tl.store(squares_ptr + tl.program_id(0) * tl.num_programs(1) + group, squares)
