"""The cross-entropy of attention rows (:mod:`trenchcoat.ops.crossent`) as Triton kernels, without materialised maps.

With a_nj the teacher's and w_nj the student's unnormalised weights, den_n = sum_j w_nj and x_nj = phi(q_n) . phi(k_j)
of far pairs, a row's term is log den_n - sum_j a_nj log w_nj, and its gradient for x_nj is 1 / den_n - a_nj / x_nj.
Features are read from memory (:mod:`trenchcoat.ops.triton.features`), as every key is read T / tile times. `query_side`
iterates over a query tile's keys once: with an online softmax of the teacher, loss, denominators and the sum over j of
(a_nj / x_nj) phi(k_j) come from the same pass. `key_side` iterates over a key tile's queries. Terms without a_nj come
from running sums of phi, so tiles the teacher does not see are skipped. There are no atomic additions.

Scores and logarithms are in units of log 2. Shape legend: as in :mod:`trenchcoat.ops.triton.parts`; positions count
from the first token of a row, without padding between tokens; `RESIDENT` tokens of the tile that stays on chip (queries
in `query_side`, keys in `key_side`), `STREAMED` tokens of the tiles that are streamed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from trenchcoat.ops.crossent import SMALLEST
from trenchcoat.ops.triton.features import load_phi, load_side, load_sum, store_sum, tile_tokens, weighted_sum
from trenchcoat.ops.triton.maps import features, features_backward, load_map
from trenchcoat.ops.triton.parts import lines, near_start, place, product, rounded, row_of, scores, store_tile

SAFE: tl.constexpr = tl.constexpr(SMALLEST)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Largest score of no keys: finite, so that the difference of two is 0."""


@triton.jit
def first_seer(key, C: tl.constexpr):
    """First query for which the key is far (if not a sink)."""
    if C.kind == "terrace":
        query = (key // C.window + 2) * C.window
    elif C.kind == "sliding":
        query = key + C.window
    else:
        query = key
    return query


@triton.jit
def pairs(query, key, teacher_window, C: tl.constexpr, WINDOWED: tl.constexpr):
    """(near, far, seen by the teacher) of queries and keys, broadcast together."""
    causal = key <= query
    near = ((key >= near_start(query, C)) | (key < C.sinks)) & causal
    far = causal & (near == 0)
    seen = causal
    if WINDOWED:
        seen = causal & (key > query - teacher_window)
    return near, far, seen


@triton.jit
def both_scores(a, b, fa, ga, fb, gb, scale, cap, C: tl.constexpr):
    """(scores over log 2, phi(a) . phi(b)), [tokens of a, tokens of b]."""
    s = scores(a, b, tl.full([1, 1], True, tl.int1), scale * LOG2E, cap * LOG2E, C)
    if not C.softcap:
        s = s * (scale * LOG2E)
    x = product(fa, tl.trans(fb), C.low, C)
    if C.paired:
        x += product(ga, tl.trans(gb), C.low, C)
    return s, x


@triton.jit
def log_similarity(x, C: tl.constexpr):
    """log2 x, clamped. In half precision the hardware's, accurate to 22 bits: Triton's takes 18 instructions."""
    x = tl.maximum(x, SAFE)
    if C.split and not C.wide:
        log_x = libdevice.fast_log2f(x)
    else:
        log_x = tl.log2(x)
    return log_x


@triton.jit
def over_similarity(e, x, log_x, TINY: tl.constexpr):
    """2^e / x, 0 where x was clamped (TINY: x can be that small)."""
    w = tl.exp2(e - log_x)
    if TINY:
        w = tl.where(x >= SAFE, w, 0.0)
    return w


@triton.jit
def masked_tile(i, stop, begin, before, resume):
    """The i-th tile of [0, stop), then of those from `begin`, and after `before` in total, of those from `resume`."""
    tile = tl.where(i < stop, i, begin + i - stop)
    return tl.where(i < before, tile, resume + i - before)


@triton.jit
def without_keys(logit_ptr, h, zero, C: tl.constexpr):
    """(sink logit, largest score, the teacher's sum) of each query before any key."""
    logit, top, total = 0.0, zero + LOWEST, zero
    if C.sink_logit:
        logit = tl.load(logit_ptr + h) * LOG2E
        top = zero + logit
        if C.kind != "linear":
            total += 1.0
    return logit, top, total


@triton.jit
def absorb(
    s, x, far, top, total, cross, acc_f, acc_g, fk, gk,
    C: tl.constexpr, MASKED: tl.constexpr, TINY: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """Adds a key tile to the teacher's sum, sum e log x and sum (e / x) phi(k) over far keys, e = 2^(s - top).

    Returns these, e, and the factor the previous sums were rescaled by."""
    above = tl.maximum(top, tl.max(s, 1))
    fade = tl.exp2(top - above)
    s -= above[:, None]
    e = tl.exp2(s)
    log_x = log_similarity(x, C)
    total = total * fade + tl.sum(e, 1)
    gained = e * log_x
    if MASKED:
        gained = tl.where(far, gained, 0.0)
    cross = cross * fade + tl.sum(gained, 1)
    if LEARN:
        w = over_similarity(s, x, log_x, TINY)
        if MASKED:
            w = tl.where(far, w, 0.0)
        acc_f = acc_f * fade[:, None] + product(w, fk, C.low, C)
        if C.paired:
            acc_g = acc_g * fade[:, None] + product(w, gk, C.low, C)
    return above, total, cross, acc_f, acc_g, e, fade


@triton.jit
def near_without_keys(logit, top, zero, C: tl.constexpr):
    """Initial values of `absorb_near`: the sink logit's part."""
    near_sum, share = zero, zero
    if C.sink_logit and C.kind != "linear":
        near_sum, share = zero + 1.0, tl.exp2(logit - top)
    return near_sum, share, share * logit


@triton.jit
def absorb_near(s, near, e, fade, largest, near_sum, share, weighted):
    """Adds a tile's near keys to sum 2^(s - largest) and, with the teacher's e, to sum e and sum e s."""
    own = tl.where(near, s, float("-inf"))
    above = tl.maximum(largest, tl.max(own, 1))
    near_sum = near_sum * tl.exp2(largest - above) + tl.sum(tl.exp2(own - above[:, None]), 1)
    share = share * fade + tl.sum(tl.where(near, e, 0.0), 1)
    weighted = weighted * fade + tl.sum(tl.where(near, e * s, 0.0), 1)
    return above, near_sum, share, weighted


@triton.jit
def key_range(t0, last, teacher_window, C: tl.constexpr, WINDOWED: tl.constexpr, SIZE: tl.constexpr):
    """(sink tiles, first tile the teacher sees partly, first it sees fully, first not entirely far, end) for queries t0
    to last; sink tiles end before the second, and the first four are non-decreasing."""
    sinks: tl.constexpr = (C.sinks + SIZE - 1) // SIZE
    there = t0 <= last
    end = tl.where(there, last // SIZE + 1, 0)
    edge = tl.where(there, near_start(t0, C) // SIZE, 0)
    part, whole = edge * 0, edge * 0 + sinks
    if WINDOWED:
        part = tl.maximum(t0 - teacher_window + 1, 0) // SIZE
        whole = tl.maximum(whole, tl.cdiv(tl.maximum(last - teacher_window + 1, 0), SIZE))
    whole = tl.minimum(whole, edge)
    part = tl.minimum(part, whole)
    return tl.minimum(part, sinks), part, whole, edge, end


@triton.jit
def finish(
    ok, fq, gq, z1, z2, top, total, cross, largest, near_sum, share, weighted, far_den, log_ratio, logit,
    C: tl.constexpr,
):  # fmt: skip
    """Per query: (cross-entropy, teacher's log-sum, its total weight on keys / den, gradient of log(g / l))."""
    far_den += tl.sum(rounded(fq, C) * z1[None, :], 1)
    if C.paired:
        far_den += tl.sum(rounded(gq, C) * z2[None, :], 1)
    total = tl.where(ok, total, 1.0)
    everything = total
    if C.kind == "linear":
        if C.sink_logit:
            total += tl.exp2(logit - top)
        den = far_den + 1e-12
        everything = everything / total
        expected = cross / total
        dlog = share * 0.0
    else:
        near_den = near_sum * tl.exp2(log_ratio)
        den = tl.where(ok, far_den + near_den, 1.0)
        everything = everything / total
        expected = (cross + weighted + (log_ratio - largest) * share) / total
        dlog = near_den * (everything / den) - share / total
    return LN2 * (everything * tl.log2(den) - expected), top + tl.log2(total), everything / den, dlog


@triton.jit
def store_query_gradient(
    q, line, acc_f, acc_g, z1, z2, weight, fk_base, stride, edge, end, query, ok, last, length, h, QUERY, du_base,
    du_stride, C: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write du of a query tile: weight_n times the sum of phi(k) over far keys, of (z1, z2) and of the tiles from
    `edge` to `end`, minus `acc`; through the activation."""
    acc_f = z1[None, :] * weight[:, None] - acc_f
    acc_g = z2[None, :] * weight[:, None] - acc_g
    if C.kind != "linear":
        end = tl.minimum(end, tl.cdiv(near_start(last, C), SIZE))
    for j in range(edge, end):
        key, there = tile_tokens(j, length, SIZE)
        fk, gk = load_phi(fk_base, stride, key, there, C)
        _near, far, _seen = pairs(query[:, None], key[None, :], 0, C, False)
        far = tl.where(far, 1.0, 0.0)
        acc_f += product(far, fk, C.low, C) * weight[:, None]
        if C.paired:
            acc_g += product(far, gk, C.low, C) * weight[:, None]
    f, g = features(q, line, ok, QUERY, h, load_map(QUERY, h, C), C)
    du = features_backward(f, g, acc_f, acc_g, C)
    store_tile(du_base, du_stride, query, ok, du, C.columns, C.block_p)


@triton.jit
def query_side(
    Q, K, FQ, FK, QUERY, KEY_SUMS, ROW, LOSS, QUERY_SUMS, DU, log_ratio_ptr, logit_ptr, ROWS,
    heads, kv_heads, maps, tiles, key_tiles, scale, cap, teacher_window,
    C: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WINDOWED: tl.constexpr, TINY: tl.constexpr,
    LEARN: tl.constexpr,
):  # fmt: skip
    """One tile of queries; grid (R H tiles), the longest rows first.

    LOSS = (cross-entropy, gradient of log(g / l)) of every tile, [R H, tiles]. With LEARN also: ROW = (teacher's
    log-sum, weight / den), float32 [R, H, T]; QUERY_SUMS, the tile's sum of weight / den phi(q), [R H, tiles, F]; DU,
    the gradient of the query map's pre-activations, [R, H, T, P]. KEY_SUMS are running totals.
    """
    row, i = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    r, h = row // heads, row % heads
    start, length, _first = row_of(ROWS, r, C)
    last = tl.minimum(i * RESIDENT + RESIDENT, length) - 1
    token, ok, q, fq, gq = load_side(place(Q, r, h, start), Q, place(FQ, r, h, start), FQ, i, length, C, RESIDENT)
    k_base, fk_base = place(K, r, h * kv_heads // heads, start), place(FK, r, h * maps // heads, start)
    log_ratio, zero = tl.load(log_ratio_ptr + h) * LOG2E, tl.zeros([RESIDENT], tl.float32)
    logit, top, total = without_keys(logit_ptr, h, zero, C)
    cross, far_den, largest = zero, zero, top
    acc_f, acc_g = tl.zeros([RESIDENT, C.block_p], tl.float32), tl.zeros([RESIDENT, C.block_p], tl.float32)
    stop, part, whole, edge, end = key_range(i * RESIDENT, last, teacher_window, C, WINDOWED, STREAMED)
    for j in range(whole, edge):
        _key, _there, k, fk, gk = load_side(k_base, K, fk_base, FK, j, length, C, STREAMED)
        s, x = both_scores(q, k, fq, gq, fk, gk, scale, cap, C)
        top, total, cross, acc_f, acc_g, _e, _fade = absorb(
            s, x, x, top, total, cross, acc_f, acc_g, fk, gk, C, False, TINY, LEARN
        )
    near_sum, share, weighted = near_without_keys(logit, top, zero, C)
    before = stop + whole - part
    for n in range(0, before + end - edge):
        j = masked_tile(n, stop, part, before, edge)
        key, _there, k, fk, gk = load_side(k_base, K, fk_base, FK, j, length, C, STREAMED)
        near, far, seen = pairs(token[:, None], key[None, :], teacher_window, C, WINDOWED)
        s, x = both_scores(q, k, fq, gq, fk, gk, scale, cap, C)
        far_den += tl.sum(tl.where(far & (j >= edge), x, 0.0), 1)
        top, total, cross, acc_f, acc_g, e, fade = absorb(
            tl.where(seen, s, float("-inf")), x, far, top, total, cross, acc_f, acc_g, fk, gk, C, True, TINY, LEARN
        )
        if C.kind != "linear":
            largest, near_sum, share, weighted = absorb_near(s, near, e, fade, largest, near_sum, share, weighted)
    z1, z2 = load_sum(KEY_SUMS, (r * maps + h * maps // heads) * key_tiles + edge, True, C)
    loss, log_sum, weight, dlog = finish(
        ok, fq, gq, z1, z2, top, total, cross, largest, near_sum, share, weighted, far_den, log_ratio, logit, C
    )
    mine = row * tiles + i
    tl.store(LOSS[0] + mine, tl.sum(tl.where(ok, loss, 0.0), 0))
    tl.store(LOSS[1] + mine, tl.sum(tl.where(ok, dlog, 0.0), 0))
    if LEARN:
        weight = tl.where(ok, weight, 0.0)
        tl.store(place(ROW[0], r, h, start) + token, log_sum, mask=ok)
        tl.store(place(ROW[1], r, h, start) + token, weight, mask=ok)
        sum1, sum2 = weighted_sum(fq, gq, weight, C)
        store_sum(QUERY_SUMS, mine, sum1, sum2, C)
        fade = tl.exp2(top - log_sum)[:, None]
        store_query_gradient(
            q, lines(Q, r, h, start, token), acc_f * fade, acc_g * fade, z1, z2, weight, fk_base, FK[3], edge, end,
            token, ok, last, length, h, QUERY, place(DU, r, h, start), DU[3], C, STREAMED,
        )  # fmt: skip


@triton.jit
def query_range(
    k0, length, teacher_window, C: tl.constexpr, WINDOWED: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr
):  # fmt: skip
    """(first tile of queries, first from which all keys are far, a multiple of RESIDENT tokens, first not fully seen by
    the teacher or cut by the row's end, end) for the RESIDENT keys from k0; non-decreasing."""
    ratio: tl.constexpr = RESIDENT // STREAMED
    end = tl.cdiv(length, STREAMED)
    whole = tl.minimum(tl.cdiv(first_seer(k0 + RESIDENT - 1, C), RESIDENT) * ratio, end)
    begin = tl.minimum(first_seer(k0, C) // STREAMED, whole)
    cut, last = length, end
    if WINDOWED:
        cut = tl.minimum(length, k0 + teacher_window)
        last = tl.minimum(end, tl.cdiv(k0 + RESIDENT - 1 + teacher_window, STREAMED))
    cut = tl.maximum(cut // STREAMED, whole)
    return begin, whole, cut, tl.maximum(last, cut)


@triton.jit
def key_side(
    Q, K, FQ, FK, KEY, QUERY_SUMS, ROW, DU, ROWS, heads, kv_heads, maps, tiles, scale, cap, teacher_window,
    C: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WINDOWED: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """One tile of keys for one query head; grid (R H tiles). DU [R, H, T, P] is the gradient of the key map's
    pre-activations; QUERY_SUMS are running totals from the end, over tiles of RESIDENT queries."""
    row, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    r, h = row // heads, row % heads
    start, length, _first = row_of(ROWS, r, C)
    k_base, fk_base = place(K, r, h * kv_heads // heads, start), place(FK, r, h * maps // heads, start)
    key, ok, k, fk, gk = load_side(k_base, K, fk_base, FK, i, length, C, RESIDENT)
    q_base, fq_base = place(Q, r, h, start), place(FQ, r, h, start)
    log_sum_base, weight_base = place(ROW[0], r, h, start), place(ROW[1], r, h, start)
    acc_f, acc_g = tl.zeros([RESIDENT, C.block_p], tl.float32), tl.zeros([RESIDENT, C.block_p], tl.float32)
    begin, whole, cut, end = query_range(i * RESIDENT, length, teacher_window, C, WINDOWED, RESIDENT, STREAMED)
    for j in range(whole, cut):
        query, there, q, fq, gq = load_side(q_base, Q, fq_base, FQ, j, length, C, STREAMED)
        s, x = both_scores(k, q, fk, gk, fq, gq, scale, cap, C)
        s -= tl.load(log_sum_base + query, mask=there, other=0.0)[None, :]
        w = over_similarity(s, x, log_similarity(x, C), TINY)
        acc_f += product(w, fq, C.low, C)
        if C.paired:
            acc_g += product(w, gq, C.low, C)
    for n in range(0, whole - begin + end - cut):
        j = masked_tile(n, 0, begin, whole - begin, cut)
        query, there, q, fq, gq = load_side(q_base, Q, fq_base, FQ, j, length, C, STREAMED)
        _near, far, seen = pairs(query[None, :], key[:, None], teacher_window, C, WINDOWED)
        far = far & there[None, :]
        s, x = both_scores(k, q, fk, gk, fq, gq, scale, cap, C)
        s -= tl.load(log_sum_base + query, mask=there, other=0.0)[None, :]
        weight = tl.load(weight_base + query, mask=there & (j < whole), other=0.0)
        w = tl.where(far & seen, over_similarity(s, x, log_similarity(x, C), TINY), 0.0)
        w -= tl.where(far, weight[None, :], 0.0)
        acc_f += product(w, fq, C.low, C)
        if C.paired:
            acc_g += product(w, gq, C.low, C)
    ratio: tl.constexpr = RESIDENT // STREAMED
    after = whole // ratio - 1
    z1, z2 = load_sum(QUERY_SUMS, row * tiles + after, (whole % ratio == 0) & (after >= 0), C)
    m = h * maps // heads
    f, g = features(k, lines(K, r, h * kv_heads // heads, start, key), ok, KEY, m, load_map(KEY, m, C), C)
    du = features_backward(f, g, z1[None, :] - acc_f, z2[None, :] - acc_g, C)
    du = tl.where((key >= C.sinks)[:, None], du, 0.0)
    store_tile(place(DU, r, h, start), DU[3], key, ok, du, C.columns, C.block_p)
