"""Generation as Triton kernels: a few new tokens against a state of constant size, updated in place.

Up to W tokens take two launches without host synchronisation, so they can be captured in a CUDA graph:
:func:`trenchcoat.ops.triton.prepare.prepare`, and `read`, whose programs hold a slice of the far sum S, read once for
all tokens and query heads of a key map. It adds the leaving keys, divides, and stores the new pairs. S is read as
float32, as in the first launch.

Shape legend: as in :mod:`trenchcoat.ops.triton.prepare`; N buffer slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trenchcoat.ops.state import FusedMap, FusedMaps, HeadWeights, Rule, StudentState, Tokens
from trenchcoat.ops.triton.features import load_phi, load_sum
from trenchcoat.ops.triton.launch import (
    Call,
    accepted,
    block,
    inner,
    launch_kernel,
    refused,
    wanted_programs,
)
from trenchcoat.ops.triton.parts import Constants, features_of, lines, place
from trenchcoat.ops.triton.prepare import count_of, exact, leaving, prepare, row_tokens
from trenchcoat.ops.triton.tiles import Tile

WIDEST_SLICE, NARROWEST_SLICE = 64, 16
"""Columns of the far sum per program: as many as allow two programs per multiprocessor."""
LARGEST_SLICE = 1 << 14
"""Entries of the far sum per program: half of the registers of its four warps."""
FEW_ROWS = 8
"""Rows (tokens x query heads) up to which `read` handles them one by one: a tile of 16 for tensor cores needs so many
registers that fewer programs fit on a multiprocessor, too few to saturate memory bandwidth."""
RING_TILE = 1 << 14
"""Entries of a tile of buffered keys: 64 KiB of shared memory in float32."""


@triton.jit
def combine(a, b):
    """a @ b in float32 for tiles, and without tensor cores for a single row or a single term."""
    if a.shape[0] == 1:
        return tl.sum(tl.trans(a) * b, 0)[None, :]
    elif a.shape[1] == 1:
        return a * b
    else:
        return exact(a, b)


@triton.jit
def load_features(base, row, ok, C: tl.constexpr):
    """Both halves of stored features in float32."""
    f, g = load_phi(base, C.features, row, ok, C)
    return f.to(tl.float32), g.to(tl.float32)


@triton.jit
def load_slice(FAR, row, e, C: tl.constexpr):
    """(address of the first half's entries, sums of both halves [P, columns e]) of one map."""
    p = tl.arange(0, C.block_p)[:, None]
    at = (row.to(tl.int64) * C.features + p) * C.values + e[None, :]
    ok = (p < C.columns) & (e[None, :] < C.values)
    s1 = tl.load(FAR[0] + at, mask=ok, other=0.0).to(tl.float32)
    s2 = s1
    if C.paired:
        s2 = tl.load(FAR[0] + at + C.columns * C.values, mask=ok, other=0.0).to(tl.float32)
    return at, s1, s2


@triton.jit
def store_half(s_ptr, at, e, s, m, turn, half, C: tl.constexpr):
    """Write one half of a slice; bfloat16 is rounded as by :func:`trenchcoat.ops.state.round_to_bfloat16` at `turn`."""
    p = tl.arange(0, C.block_p)[:, None]
    ok = (p < C.columns) & (e[None, :] < C.values)
    at += half * C.columns * C.values
    if s_ptr.dtype.element_ty == tl.bfloat16:
        element = (m * C.features + half * C.columns + p).to(tl.int64) * C.values + e[None, :]
        threshold = ((element * 2654435761 >> 8) + turn.to(tl.int64) * 40503) & 0xFFFF
        bits = s.to(tl.int32, bitcast=True) + threshold.to(tl.int32)
        s = (bits & -0x10000).to(tl.float32, bitcast=True)
    tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), mask=ok)


@triton.jit
def store_pairs(X, RING, SINK, b, g, seen, n, real_ptr, tokens, SIZE: tl.constexpr, C: tl.constexpr,
                BLOCK_T: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Write columns n of the new keys or values to their slots (and sink slots)."""
    token, ok, rank = row_tokens(tl.arange(0, BLOCK_T), 1, tokens, real_ptr, b, BLOCK_T)
    position = seen + rank
    there = ok[:, None] & (n[None, :] < SIZE)
    at = token[:, None].to(tl.int64)
    x = tl.load(place(X, b, g, 0) + at * X[3] + n[None, :], mask=there, other=0.0).to(RING[0].dtype.element_ty)
    slot = (position % SLOTS)[:, None].to(tl.int64)
    tl.store(place(RING, b, g, 0) + slot * RING[3] + n[None, :], x, mask=there)
    if C.sinks > 0:
        at = position[:, None].to(tl.int64)
        tl.store(place(SINK, b, g, 0) + at * SINK[3] + n[None, :], x, mask=there & (position[:, None] < C.sinks))


@triton.jit
def load_leaving(LEAVING, PLACE, e, number, begin, tokens, C: tl.constexpr, BLOCK_T: tl.constexpr,
                 BLOCK_L: tl.constexpr):  # fmt: skip
    """(features of both halves [L, P], values [L, columns e], position of the first token for which each is far)."""
    V, real_ptr, b, m, g, kv_heads, maps, room = PLACE
    i = tl.arange(0, BLOCK_L)
    ok = i < number
    f1, f2 = load_features(LEAVING[0] + (b * maps + m).to(tl.int64) * room * C.features, i, ok, C)
    base, stride = LEAVING[1] + (b * kv_heads + g).to(tl.int64) * room * C.values, C.values
    seer = begin + i
    if C.kind == "terrace":
        seer = begin + i * 0
    if C.kind == "linear":
        _token, ok, rank = row_tokens(i, 1, tokens, real_ptr, b, BLOCK_T)
        base, stride, seer = place(V, b, g, 0), V[3], begin + rank
    there = ok[:, None] & (e[None, :] < C.values)
    v = tl.load(base + i[:, None].to(tl.int64) * stride + e[None, :], mask=there, other=0.0).to(tl.float32)
    return f1, f2, v, seer


@triton.jit
def leaving_rows(num, den, q1, q2, LEAVING, PLACE, e, number, begin, position, tokens, C: tl.constexpr,
                 BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """Adds the leaving keys that are far for rows at `position`."""
    f1, f2, v, seer = load_leaving(LEAVING, PLACE, e, number, begin, tokens, C, BLOCK_T, BLOCK_L)
    x = combine(q1, tl.trans(f1))
    if C.paired:
        x += combine(q2, tl.trans(f2))
    x = tl.where(seer[None, :] <= position[:, None], x, 0.0)
    return num + combine(x, v), den + tl.sum(x, 1)


@triton.jit
def fold_leaving(FAR, at, s1, s2, LEAVING, PLACE, e, number, begin, tokens, C: tl.constexpr, BLOCK_T: tl.constexpr,
                 BLOCK_L: tl.constexpr):  # fmt: skip
    """Add the leaving keys to the slice of S, in memory."""
    f1, f2, v, _seer = load_leaving(LEAVING, PLACE, e, number, begin, tokens, C, BLOCK_T, BLOCK_L)
    m = PLACE[3]
    store_half(FAR[0], at, e, s1 + combine(tl.trans(f1), v), m, begin, 0, C)
    if C.paired:
        store_half(FAR[0], at, e, s2 + combine(tl.trans(f2), v), m, begin, 1, C)


@triton.jit
def read(
    K, V, Y, K_RING, V_RING, SINK_K, SINK_V, FAR, NEAR, fq_ptr, LEAVING, seen_ptr, next_ptr, real_ptr,
    tokens, heads, kv_heads, maps, room, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """y of the heads of one key map (0 where there is no token), and the state after; grid (B K, slices of E)."""
    b, m = tl.program_id(0) // maps, tl.program_id(0) % maps
    g, shared = m * kv_heads // maps, heads // maps
    seen = tl.load(next_ptr + b)
    count = count_of(real_ptr, b, tokens, BLOCK_T)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    _first, number, begin = leaving(seen, count, tokens, C)
    where = (V, real_ptr, b, m, g, kv_heads, maps, room)
    if C.far:
        at_s, s1, s2 = load_slice(FAR, tl.program_id(0), e, C)
        z1, z2 = load_sum(LEAVING[2], tl.program_id(0), True, C)
    for n in range(0, tl.cdiv(tokens * shared, ROWS)):
        row = n * ROWS + tl.arange(0, ROWS)
        token, ok, rank = row_tokens(row, shared, tokens, real_ptr, b, BLOCK_T)
        h = m * shared + row % shared
        at = (b * heads + h) * tokens + token
        num, den = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS], tl.float32) + 1e-12
        if C.kind != "linear":
            there = ok[:, None] & (e[None, :] < C.values)
            num = tl.load(NEAR[0] + at[:, None].to(tl.int64) * C.values + e[None, :], mask=there, other=0.0)
            den = tl.load(NEAR[1] + at, mask=ok, other=1.0)
        if C.far:
            q1, q2 = load_features(fq_ptr, at, ok, C)
            num += combine(q1, s1)
            den += tl.sum(q1 * z1[None, :], 1)
            if C.paired:
                num += combine(q2, s2)
                den += tl.sum(q2 * z2[None, :], 1)
            if number > 0:
                num, den = leaving_rows(
                    num, den, q1, q2, LEAVING, where, e, number, begin, seen + rank, tokens, C, BLOCK_T, BLOCK_L
                )
        y = tl.where(ok[:, None], num / den[:, None], 0.0).to(Y[0].dtype.element_ty)
        tl.store(
            lines(Y, b, h, 0, token)[:, None] + e[None, :], y, mask=(token < tokens)[:, None] & (e[None, :] < C.values)
        )
    if C.far:  # noqa: SIM102 (known when compiled)
        if number > 0:
            fold_leaving(FAR, at_s, s1, s2, LEAVING, where, e, number, begin, tokens, C, BLOCK_T, BLOCK_L)
    if C.kind != "linear":  # noqa: SIM102
        if m * kv_heads % maps == 0:
            store_pairs(V, V_RING, SINK_V, b, g, seen, e, real_ptr, tokens, C.values, C, BLOCK_T, SLOTS)
            if tl.program_id(1) == 0:
                d = tl.arange(0, C.block_d)
                store_pairs(K, K_RING, SINK_K, b, g, seen, d, real_ptr, tokens, C.dim, C, BLOCK_T, SLOTS)
    if (m == 0) & (tl.program_id(1) == 0):
        tl.store(seen_ptr + b, (seen + count).to(tl.int64))


@torch.no_grad()
def decode(
    tokens: Tokens,
    maps: FusedMaps | None,
    heads: HeadWeights,
    state: StudentState,
    rule: Rule,
) -> Tensor:
    """y [B, H, T, E] in q's dtype for a few tokens, updating `state` in place; a token with mask False changes nothing
    and outputs 0. A bfloat16 S is rounded once per call, as by :func:`trenchcoat.ops.state.round_to_bfloat16`.

    Raises:
        ValueError: the kernels do not support the call.
    """
    query, key = maps if maps is not None and rule.far else (None, None)
    q, k, v = (inner(x) for x in (tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE))
    log_ratio_H = rule.log_ratio(heads.mix_H)
    call = accepted(Call(rule, q, k, v, query, key, log_ratio_H, heads.sink_logit_H))
    if rule.kind == "linear" and not rule.far:
        raise refused("kind 'linear' has nothing to read with its far part off")
    y = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    real = None if tokens.mask_BT is None else tokens.mask_BT.to(q.device, torch.int32)
    for t in range(0, q.shape[2], rule.window):
        span = slice(t, t + rule.window)
        pieces = [x[:, :, span] for x in (q, k, v, y)]
        _step(call, log_ratio_H, pieces, state, None if real is None else real[:, span].contiguous())
    captured = q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    state.counted(q.shape[2] if real is None and not captured else None)
    return y


def slice_columns(values: int, c: Constants, programs: int, wanted: int) -> int:
    """Columns of S per program of `read`, so that up to `wanted` programs run."""
    columns = min(block(values), WIDEST_SLICE, max(NARROWEST_SLICE, LARGEST_SLICE // features_of(c)))
    while columns > NARROWEST_SLICE and programs * triton.cdiv(values, columns) < wanted:
        columns //= 2
    return columns


@dataclass(frozen=True)
class StepTiles:
    """The tiles a step is compiled for, and `room` for leaving keys."""

    tokens: int
    leaving: int
    slots: int
    near: int
    read_rows: int
    read_leaving: int
    queries: int
    ring: int
    room: int


def sizes_of(call: Call, rows: int, tokens: int) -> StepTiles:
    """The tiles for a step of `tokens` tokens in `rows` rows."""
    c, rule = call.constants, call.rule
    # without a far part, one program of `read` handles one key/value head
    shared = call.heads // (call.kv_heads if call.key is None else call.maps)
    room = rule.window if rule.kind == "terrace" else tokens
    return StepTiles(
        tokens=block(tokens), leaving=block(room), slots=max(1, rule.slots), room=room,
        near=min(64, block(tokens * (call.heads // call.kv_heads))),
        read_rows=1 if tokens * shared <= FEW_ROWS else min(64, block(tokens * shared)),
        read_leaving=1 if room == 1 else block(room),
        queries=min(64, block(rows * tokens)),
        ring=max(16, min(block(rule.slots), RING_TILE // max(c.block_d.value, c.block_e.value))),
    )  # fmt: skip


def leaving_dtype(call: Call) -> torch.dtype:
    """Dtype of the leaving keys' features between the launches; for a whole chunk, the dtype prefill rounds them to."""
    return torch.bfloat16 if call.rule.kind == "terrace" and call.q.dtype != torch.float32 else torch.float32


def _whole(phi: FusedMap | None) -> tuple[Tensor | None, ...]:
    """(matrix, placeholder for its remainder, bias): `prepare` reads maps in float32, without a remainder."""
    if phi is None:
        return None, None, None
    matrix = phi.matrix.contiguous()
    return matrix, matrix, phi.bias


def _step(call: Call, log_ratio_H: Tensor, pieces: list[Tensor], state: StudentState, real: Tensor | None) -> None:
    rule, c = call.rule, call.constants
    q, k, v, y = pieces
    rows, heads, tokens = q.shape[:3]
    values, features = v.shape[3], 0 if call.key is None else call.key.features
    kv_heads, maps = call.kv_heads, call.kv_heads if call.key is None else call.maps
    sizes = sizes_of(call, rows, tokens)

    def scratch(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        """Memory used for one step."""
        return torch.empty(shape, dtype=of, device=q.device)

    far = (state.far_s_BKFE, state.far_z_BKF)
    near = scratch(rows, heads, tokens, values), scratch(rows, heads, tokens)
    gone = (
        scratch(rows, maps, sizes.room, features, of=leaving_dtype(call)),
        scratch(rows, kv_heads, sizes.room, values, of=state.v_BGNE.dtype),
        scratch(rows, maps, features),
    )
    fq, following = scratch(rows, heads, tokens, features), scratch(rows, of=torch.int32)
    sinks = (state.sink_k_BGSD, state.sink_v_BGSE) if rule.sinks else (None, None)
    held = [call.tensor(x) for x in (state.k_BGND, state.v_BGNE, *sinks)]
    whole = [_whole(phi) for phi in (call.query, call.key)]
    counts = (heads, kv_heads, maps, sizes.room)
    tiles = {"BLOCK_T": sizes.tokens, "SLOTS": sizes.slots}
    blocks = triton.cdiv(tokens * (heads // kv_heads), sizes.near)
    near_programs = 0 if rule.kind == "linear" else rows * kv_heads * blocks
    query_programs = 0 if call.key is None else heads * triton.cdiv(rows * tokens, sizes.queries)
    key_programs = 0 if call.key is None else rows * maps
    launch_kernel(
        prepare, (near_programs + query_programs + key_programs,), call,
        *(call.tensor(x) for x in (q, k, v)), *held, *whole, far, near, fq, gone, state.seen_B, following, real,
        log_ratio_H, call.logit, rows, tokens, *counts, near_programs, query_programs, *call.numbers(),
        ROWS=sizes.near, QUERIES=sizes.queries, TILE=sizes.ring, BLOCK_L=sizes.leaving, usual=Tile(8, 1), **tiles,
    )  # fmt: skip
    columns = slice_columns(values, c, rows * maps, wanted_programs(q.device, 2))
    launch_kernel(
        read, (rows * maps, triton.cdiv(values, columns)), call,
        *(call.tensor(x) for x in (k, v, y)), *held, far, near, fq, gone, state.seen_B, following, real,
        tokens, *counts, ROWS=sizes.read_rows, COLUMNS=columns, BLOCK_L=sizes.read_leaving, usual=Tile(4, 1), **tiles,
    )  # fmt: skip
