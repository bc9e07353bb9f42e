"""The first launch of a decode step: everything the second one needs besides the far sum S.

Three kinds of programs in one grid: the near part of the heads that share keys; phi(q) of a head for all rows at once,
so that its map is read once; phi(k) and the values of the keys that leave the window, with the counts z. The results go
to scratch memory, as :func:`trenchcoat.ops.triton.decode.read` overwrites the buffer slots.

Products use tf32x3 (relative error about 2^-21): neither features nor weights are rounded.

Shape legend: as in :mod:`trenchcoat.ops.triton.parts`; B rows, T new tokens, L leaving keys. A tile's rows are pairs
(token, query head) of one key/value head or key map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton.features import load_sum, store_phi, store_sum
from trenchcoat.ops.triton.maps import activate, load_map, load_matrix
from trenchcoat.ops.triton.parts import lines, load_tile, near_start, place, store_tile


@triton.jit
def exact(a, b):
    """a @ b in float32."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")


@triton.jit
def row_tokens(row, shared, tokens, real_ptr, b, BLOCK_T: tl.constexpr):
    """(token, whether it exists, real tokens before it) of a tile's rows; BLOCK_T is at least T."""
    token = row // shared
    there = token < tokens
    if real_ptr is None:
        return token, there, token
    else:
        other = tl.arange(0, BLOCK_T)
        real = tl.load(real_ptr + b * tokens + other, mask=other < tokens, other=0)
        rank = tl.sum(tl.where(other[None, :] < token[:, None], real[None, :], 0), 1)
        return token, there & (tl.load(real_ptr + b * tokens + token, mask=there, other=0) != 0), rank


@triton.jit
def count_of(real_ptr, b, tokens, BLOCK_T: tl.constexpr):
    """Real tokens of row b."""
    if real_ptr is None:
        return tokens
    else:
        other = tl.arange(0, BLOCK_T)
        return tl.sum(tl.load(real_ptr + b * tokens + other, mask=other < tokens, other=0), 0)


@triton.jit
def leaving(seen, count, tokens, C: tl.constexpr):
    """(first position, number of keys that become far, position of the first token for which they are not near).

    Terraces: the second to last chunk, when a new one begins. Kind linear: the new tokens, by their index in the call.
    """
    if C.kind == "terrace":
        begin = (seen + C.window - 1) // C.window * C.window
        gone = (begin < seen + count) & (begin >= 2 * C.window)
        return begin - 2 * C.window, tl.where(gone, C.window, 0), begin
    elif C.kind == "sliding":
        return seen - C.window, count, seen
    else:
        return seen, tl.where(count > 0, tokens, 0), seen


@triton.jit
def near_block(q, k, v, visible, scale, cap, top, den, num, C: tl.constexpr):
    """(largest score, denominator, numerator) so far, including a tile of keys."""
    s = exact(q, tl.trans(k)) * scale
    if C.softcap:
        e = tl.exp(-2.0 * tl.abs(s) / cap)
        bent = cap * (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0, -bent, bent)
    s = tl.where(visible, s, float("-inf"))
    largest = tl.maximum(top, tl.max(s, 1))
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    keep = tl.exp(top - finite)
    w = tl.exp(s - finite[:, None])
    return largest, den * keep + tl.sum(w, 1), num * keep[:, None] + exact(w, v)


@triton.jit
def prepare_near(
    pid, Q, K, V, K_RING, V_RING, SINK_K, SINK_V, NEAR, seen_ptr, next_ptr, real_ptr, log_ratio_ptr, logit_ptr,
    tokens, heads, kv_heads, scale, cap, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """r times the near part's numerators and denominators, NEAR = ([B, H, T, E], [B, H, T])."""
    shared = heads // kv_heads
    blocks = (tokens * shared + ROWS - 1) // ROWS
    b, g, n = pid // (kv_heads * blocks), pid // blocks % kv_heads, pid % blocks
    seen = tl.load(seen_ptr + b).to(tl.int32)
    if (g == 0) & (n == 0):
        tl.store(next_ptr + b, seen)
    row = n * ROWS + tl.arange(0, ROWS)
    token, ok, rank = row_tokens(row, shared, tokens, real_ptr, b, BLOCK_T)
    h = g * shared + row % shared
    position = seen + rank
    start = near_start(position, C)[:, None]
    d, e = tl.arange(0, C.block_d)[None, :], tl.arange(0, C.block_e)[None, :]
    q = tl.load(lines(Q, b, h, 0, token)[:, None] + d, mask=ok[:, None] & (d < C.dim), other=0.0)
    num, den = tl.zeros([ROWS, C.block_e], tl.float32), tl.zeros([ROWS], tl.float32)
    top = den - float("inf")
    if C.sink_logit:
        top = tl.load(logit_ptr + h, mask=ok, other=0.0).to(tl.float32)
        den += 1.0
    for first in tl.static_range(0, SLOTS, TILE):
        i = first + tl.arange(0, TILE)
        held = seen - 1 - (seen - 1 - i + SLOTS) % SLOTS
        there = (i < SLOTS) & (held >= 0)
        k = load_tile(place(K_RING, b, g, 0), K_RING[3], i, there, C.dim, C.block_d)
        v = load_tile(place(V_RING, b, g, 0), V_RING[3], i, there, C.values, C.block_e)
        visible = there[None, :] & (held[None, :] >= start)
        top, den, num = near_block(q, k, v, visible, scale, cap, top, den, num, C)
    if C.sinks > 0:
        i = tl.arange(0, C.block_s)
        there = i < C.sinks
        k = load_tile(place(SINK_K, b, g, 0), SINK_K[3], i, there, C.dim, C.block_d)
        v = load_tile(place(SINK_V, b, g, 0), SINK_V[3], i, there, C.values, C.block_e)
        top, den, num = near_block(q, k, v, there[None, :] & (i[None, :] < start), scale, cap, top, den, num, C)
    new, new_ok, new_rank = row_tokens(tl.arange(0, BLOCK_T), 1, tokens, real_ptr, b, BLOCK_T)
    held = seen + new_rank
    k = load_tile(place(K, b, g, 0), K[3], new, new_ok, C.dim, C.block_d)
    v = load_tile(place(V, b, g, 0), V[3], new, new_ok, C.values, C.block_e)
    visible = new_ok[None, :] & (held[None, :] >= start) & (held[None, :] <= position[:, None])
    top, den, num = near_block(q, k, v, visible, scale, cap, top, den, num, C)
    ratio = tl.exp(tl.load(log_ratio_ptr + h, mask=ok, other=0.0).to(tl.float32))
    out = (b * heads + h) * tokens + token
    tl.store(NEAR[1] + out, den * ratio, mask=ok)
    out = out[:, None].to(tl.int64) * C.values + e
    tl.store(NEAR[0] + out, num * ratio[:, None], mask=ok[:, None] & (e < C.values))


@triton.jit
def map_features(x, line, M, head, ok, C: tl.constexpr):
    """(f, g) of tokens x [tokens, D], whose addresses are `line`, from the map in float32."""
    matrix, _remainder, bias = load_map(M, head, C)
    if C.piece == 0:
        u = exact(x, matrix)
    else:
        u = tl.zeros([line.shape[0], C.block_p], tl.float32)
        for begin in range(0, C.block_d, C.piece):
            d = begin + tl.arange(0, C.piece)
            part = tl.load(line[:, None] + d[None, :], mask=ok[:, None] & (d[None, :] < C.dim), other=0.0)
            u += exact(part, load_matrix(M[0], head, d, tl.arange(0, C.block_p), C))
    if C.bias:
        u += bias[None, :]
    f = tl.where(ok[:, None], activate(u, C), 0.0)
    g = f
    if C.paired:
        g = tl.where(ok[:, None], activate(-u, C), 0.0)
    return f, g


@triton.jit
def prepare_queries(pid, Q, QUERY, fq_ptr, rows, tokens, heads, C: tl.constexpr, ROWS: tl.constexpr):
    """phi(q) [B, H, T, F] of one head for ROWS of the B T tokens."""
    h, n = pid % heads, pid // heads
    row = n * ROWS + tl.arange(0, ROWS)
    ok = row < rows * tokens
    b, token = row // tokens, row % tokens
    d = tl.arange(0, C.block_d)[None, :]
    line = lines(Q, b, h, 0, token)
    q = tl.load(line[:, None] + d, mask=ok[:, None] & (d < C.dim), other=0.0)
    f, g = map_features(q, line, QUERY, h, ok, C)
    store_phi(fq_ptr, C.features, (b * heads + h) * tokens + token, ok, f, g, C)


@triton.jit
def prepare_keys(
    pid, K, V, K_RING, V_RING, KEY, FAR, LEAVING, seen_ptr, next_ptr, real_ptr, tokens, kv_heads, maps, room,
    C: tl.constexpr, BLOCK_T: tl.constexpr, SLOTS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """phi(k) and values of the leaving keys of a map, and its counts z before and (in the state) after them.

    LEAVING = (features [B, K, L, F], values [B, G, L, E], counts before [B, K, F]).
    """
    b, m = pid // maps, pid % maps
    g = m * kv_heads // maps
    seen = tl.load(seen_ptr + b).to(tl.int32)
    if (C.kind == "linear") & (m == 0):
        tl.store(next_ptr + b, seen)
    z1, z2 = load_sum(FAR[1], pid, True, C)
    store_sum(LEAVING[2], pid, z1, z2, C)
    first, number, _begin = leaving(seen, count_of(real_ptr, b, tokens, BLOCK_T), tokens, C)
    if number > 0:
        i = tl.arange(0, BLOCK_L)
        if C.kind == "linear":
            _token, ok, _rank = row_tokens(i, 1, tokens, real_ptr, b, BLOCK_T)
            x = load_tile(place(K, b, g, 0), K[3], i, ok, C.dim, C.block_d)
            line = lines(K, b, g, 0, i)
        else:
            ok = (i < number) & (first + i >= C.sinks)
            slot = tl.maximum(first + i, 0) % SLOTS
            x = load_tile(place(K_RING, b, g, 0), K_RING[3], slot, ok, C.dim, C.block_d)
            line = lines(K_RING, b, g, 0, slot)
            if m * kv_heads % maps == 0:
                v = load_tile(place(V_RING, b, g, 0), V_RING[3], slot, ok, C.values, C.block_e)
                out = LEAVING[1] + (b * kv_heads + g).to(tl.int64) * room * C.values
                store_tile(out, C.values, i, i < number, v, C.values, C.block_e)
        f, half = map_features(x, line, KEY, m, ok, C)
        out = LEAVING[0] + pid.to(tl.int64) * room * C.features
        store_phi(out, C.features, i, i < number, f, half, C)
        f = f.to(LEAVING[0].dtype.element_ty).to(tl.float32)
        half = half.to(LEAVING[0].dtype.element_ty).to(tl.float32)
        store_sum(FAR[1], pid, z1 + tl.sum(f, 0), z2 + tl.sum(half, 0), C)


@triton.jit
def prepare(
    Q, K, V, K_RING, V_RING, SINK_K, SINK_V, QUERY, KEY, FAR, NEAR, fq_ptr, LEAVING, seen_ptr, next_ptr, real_ptr,
    log_ratio_ptr, logit_ptr, rows, tokens, heads, kv_heads, maps, room, near_programs, query_programs, scale, cap,
    C: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What `read` needs besides S; grid (near_programs + query_programs + B K,). `next_ptr`: a copy of `seen_ptr`."""
    pid = tl.program_id(0)
    if pid < near_programs:
        if C.kind != "linear":
            prepare_near(
                pid, Q, K, V, K_RING, V_RING, SINK_K, SINK_V, NEAR, seen_ptr, next_ptr, real_ptr, log_ratio_ptr,
                logit_ptr, tokens, heads, kv_heads, scale, cap, C, ROWS, BLOCK_T, SLOTS, TILE,
            )  # fmt: skip
    elif pid < near_programs + query_programs:
        if C.far:
            prepare_queries(pid - near_programs, Q, QUERY, fq_ptr, rows, tokens, heads, C, QUERIES)
    else:
        if C.far:
            prepare_keys(
                pid - near_programs - query_programs, K, V, K_RING, V_RING, KEY, FAR, LEAVING, seen_ptr, next_ptr,
                real_ptr, tokens, kv_heads, maps, room, C, BLOCK_T, SLOTS, BLOCK_L,
            )  # fmt: skip
