"""Feature maps in Triton kernels: x W, the activation, both halves, and their backward.

A program holds its maps whole if they fit in shared memory; otherwise it reads them, and the tokens they apply to, in
slices every time it needs them.

Shape legend: as in :mod:`trenchcoat.ops.triton.parts`; M maps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trenchcoat.ops.triton.parts import LOG2E, product


@triton.jit
def load_matrix(matrix_ptr, head, d, p, C: tl.constexpr):
    """Rows d and columns p of one of the matrices [M, D, P]."""
    at = matrix_ptr + head * C.dim * C.columns + d[:, None] * C.columns + p[None, :]
    return tl.load(at, mask=(d[:, None] < C.dim) & (p[None, :] < C.columns), other=0.0)


@triton.jit
def load_map(M, head, C: tl.constexpr):
    """(matrix, its remainder, bias) of one head; M is (matrix, remainder, bias) of all heads, [M, D, P] and [M, P]. If
    maps are read in slices, only the bias."""
    d, p = tl.arange(0, C.block_d), tl.arange(0, C.block_p)
    matrix = 0.0
    remainder = 0.0
    if C.piece == 0:
        matrix = load_matrix(M[0], head, d, p, C)
        if C.split:
            remainder = load_matrix(M[1], head, d, p, C)
    bias = tl.zeros([C.block_p], tl.float32)
    if C.bias:
        bias = tl.load(M[2] + head * C.columns + p, mask=p < C.columns, other=0.0)
    return matrix, remainder, bias


@triton.jit
def store_map(GRADS, row, d, dmatrix, dbias, C: tl.constexpr):
    """Write a program's part of a map's gradient, rows d of [D, P] and [P], to GRADS = (matrices, biases)."""
    p = tl.arange(0, C.block_p)
    ok = (d[:, None] < C.dim) & (p[None, :] < C.columns)
    at = row.to(tl.int64) * (C.dim * C.columns) + d[:, None] * C.columns + p[None, :]
    tl.store(GRADS[0] + at, dmatrix, mask=ok)
    if C.bias:
        tl.store(GRADS[1] + row * C.columns + p, dbias, mask=p < C.columns)


@triton.jit
def by_pieces(line, ok, M, head, C: tl.constexpr):
    """x W [tokens, P] of the tokens at addresses `line`, some rows of W at a time."""
    u = tl.zeros([line.shape[0], C.block_p], tl.float32)
    p = tl.arange(0, C.block_p)
    for begin in tl.range(0, C.block_d, C.piece, num_stages=2):
        d = begin + tl.arange(0, C.piece)
        x = tl.load(line[:, None] + d[None, :], mask=ok[:, None] & (d[None, :] < C.dim), other=0.0)
        u = product(x, load_matrix(M[0], head, d, p, C), C.dot, C, u)
        if C.split:
            u = product(x, load_matrix(M[1], head, d, p, C), C.dot, C, u)
    return u


@triton.jit
def back_by_pieces(line, ok, M, head, dx, C: tl.constexpr):
    """`dx` plus du W^T [tokens, D] for du at addresses `line`, some columns of W at a time."""
    d = tl.arange(0, C.block_d)
    for begin in tl.range(0, C.block_p, C.piece, num_stages=2):
        p = begin + tl.arange(0, C.piece)
        du = tl.load(line[:, None] + p[None, :], mask=ok[:, None] & (p[None, :] < C.columns), other=0.0)
        dx = product(du, tl.trans(load_matrix(M[0], head, d, p, C)), C.low, C, dx)
    return dx


@triton.jit
def activate(u, C: tl.constexpr):
    """One half of the features [tokens, P]; zeros in padding columns."""
    there = tl.arange(0, C.block_p)[None, :] < C.columns
    if C.act == "softmax" or C.act == "exp":
        if C.block_p != C.columns:
            u = tl.where(there, u, float("-inf"))
        # so that the largest is exactly 1, as its gradient requires; u LOG2E - max LOG2E would be one fused operation
        f = tl.exp2((u - tl.max(u, 1)[:, None]) * LOG2E)
        if C.act == "softmax":
            f = f * (1.0 / tl.sum(f, 1))[:, None]
    elif C.act == "relu":
        f = tl.maximum(u, 0.0)
    else:
        f = tl.where(u > 0, u + 1.0, tl.exp2(tl.minimum(u, 0.0) * LOG2E))
    f = tl.maximum(f, C.floor)
    if C.block_p != C.columns:
        f = tl.where(there, f, 0.0)
    return f


@triton.jit
def features(x, line, ok, M, head, MAP, C: tl.constexpr):
    """(f, g) of tokens x [tokens, D], whose addresses are `line`; g is f if the map is not paired. MAP is the result of
    `load_map` for M and `head`."""
    if C.piece == 0:
        u = product(x, MAP[0], C.dot, C)
        if C.split:
            u = product(x, MAP[1], C.dot, C, u)
    else:
        u = by_pieces(line, ok, M, head, C)
    if C.bias:
        u += MAP[2][None, :]
    f = activate(u, C)
    g = f
    if C.paired:
        g = activate(-u, C)
    return f, g


@triton.jit
def key_features(x, line, ok, position, M, head, MAP, C: tl.constexpr):
    """`features` of keys: zeros for the sinks, which never become far. Tokens that do not exist get features too; their
    values are zero, and `real_ones` excludes them from the counts."""
    f, g = features(x, line, ok, M, head, MAP, C)
    if C.sinks > 0:
        f = tl.where((position >= C.sinks)[:, None], f, 0.0)
        g = tl.where((position >= C.sinks)[:, None], g, 0.0)
    return f, g


@triton.jit
def activate_backward(f, df, C: tl.constexpr):
    """du of one half, computed from the features alone."""
    if C.act == "softmax":
        du = f * (df - tl.sum(f * df, 1)[:, None])
    elif C.act == "exp":
        du = f * df
        top = tl.where(f == 1.0, 1.0, 0.0)
        du -= top * (tl.sum(du, 1) / tl.maximum(tl.sum(top, 1), 1.0))[:, None]
    elif C.act == "relu":
        du = tl.where(f > C.floor, df, 0.0)
    else:
        du = df * tl.minimum(f, 1.0)
    return du


@triton.jit
def features_backward(f, g, df, dg, C: tl.constexpr):
    """du of both halves."""
    du = activate_backward(f, df, C)
    if C.paired:
        du -= activate_backward(g, dg, C)
    return du
