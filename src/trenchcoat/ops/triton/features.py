"""Features in memory: storing and loading phi of every token.

For kernels that read each token many times, where recomputing phi costs more than reading it.

Shape legend: as in :mod:`trenchcoat.ops.triton.parts`; F features, in memory the P of f and then the P of g.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton.maps import features, load_map
from trenchcoat.ops.triton.parts import lines, load_tile, place, rounded, row_of, store_tile


@triton.jit
def tile_tokens(i, length, SIZE: tl.constexpr):
    """(tokens of tile i, mask of those that exist)."""
    token = i * SIZE + tl.arange(0, SIZE)
    return token, token < length


@triton.jit
def load_phi(base, stride, token, ok, C: tl.constexpr):
    """Stored features (f, g), [tokens, P] each."""
    f = load_tile(base, stride, token, ok, C.columns, C.block_p)
    g = f
    if C.paired:
        g = load_tile(base + C.columns, stride, token, ok, C.columns, C.block_p)
    return f, g


@triton.jit
def store_phi(base, stride, token, ok, f, g, C: tl.constexpr):
    """The counterpart of `load_phi`, in the destination's dtype."""
    store_tile(base, stride, token, ok, f, C.columns, C.block_p)
    if C.paired:
        store_tile(base + C.columns, stride, token, ok, g, C.columns, C.block_p)


@triton.jit
def load_side(x_base, X, phi_base, PHI, i, length, C: tl.constexpr, SIZE: tl.constexpr):
    """(tokens of tile i, which exist, queries or keys [tokens, D], features f, g)."""
    token, ok = tile_tokens(i, length, SIZE)
    x = load_tile(x_base, X[3], token, ok, C.dim, C.block_d)
    f, g = load_phi(phi_base, PHI[3], token, ok, C)
    return token, ok, x, f, g


@triton.jit
def load_sum(SUMS, row, there, C: tl.constexpr):
    """(z1, z2) of one row of [rows, F]; zeros unless `there`."""
    p = tl.arange(0, C.block_p)
    at = SUMS + row.to(tl.int64) * C.features + p
    ok = (p < C.columns) & there
    z1 = tl.load(at, mask=ok, other=0.0)
    z2 = z1
    if C.paired:
        z2 = tl.load(at + C.columns, mask=ok, other=0.0)
    return z1, z2


@triton.jit
def store_sum(SUMS, row, z1, z2, C: tl.constexpr):
    """The counterpart of `load_sum`."""
    p = tl.arange(0, C.block_p)
    at = SUMS + row.to(tl.int64) * C.features + p
    tl.store(at, z1, mask=p < C.columns)
    if C.paired:
        tl.store(at + C.columns, z2, mask=p < C.columns)


@triton.jit
def weighted_sum(f, g, weight, C: tl.constexpr):
    """Sums over tokens of weight times rounded features, of both halves."""
    z1 = tl.sum(rounded(f, C) * weight[:, None], 0)
    z2 = z1
    if C.paired:
        z2 = tl.sum(rounded(g, C) * weight[:, None], 0)
    return z1, z2


@triton.jit
def stored_features(X, MAP, PHI, SUMS, ROWS, inputs, maps, tiles, C: tl.constexpr, SIZE: tl.constexpr):
    """phi(x) of one tile and map, in the dtype of PHI [R, M, T, F], and its sum without sink keys, SUMS [R M, tiles, F]
    (None: skipped); grid (R M tiles)."""
    i, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    r, m = row // maps, row % maps
    start, length, first = row_of(ROWS, r, C)
    token, ok = tile_tokens(i, length, SIZE)
    h = m * inputs // maps
    x = load_tile(place(X, r, h, start), X[3], token, ok, C.dim, C.block_d)
    f, g = features(x, lines(X, r, h, start, token), ok, MAP, m, load_map(MAP, m, C), C)
    store_phi(place(PHI, r, m, start), PHI[3], token, ok, f, g, C)
    if SUMS is not None:
        z1, z2 = weighted_sum(f, g, tl.where(ok & (first + token >= C.sinks), 1.0, 0.0), C)
        store_sum(SUMS, tl.program_id(0), z1, z2, C)
