"""Code shared by the Triton kernels: a call's constants, products of rounded operands, feature maps, window scores.

A kernel's program works on chunks of W tokens of one row and one query head. Products round their operands to the
inputs' type (bfloat16 for gradients and far sums, whose range exceeds float16) and accumulate in float32; everything
else is float32. A paired feature map has two halves, kept separate: f = act(u) and g = act(-u).

Shape legend: W tokens of a chunk, D key dim, E value dim, P columns of a map, S sinks; `block_*` are the same rounded
up to powers of two. A tensor argument is a tuple (pointer, stride of the batch row, of the head, of the token); the
last axis is contiguous. `*_BOX`: see :func:`load_chunk`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import triton
import triton.language as tl


@dataclass(frozen=True)
class Constants:
    """The constants a kernel is compiled for; every field becomes a `tl.constexpr`."""

    kind: Any
    window: Any
    block_w: Any
    dim: Any
    block_d: Any
    values: Any
    block_e: Any
    columns: Any
    block_p: Any
    act: Any
    """softmax, exp, relu or elu."""
    paired: Any
    features: Any
    """Columns of both halves together."""
    bias: Any
    split: Any
    """The map's matrix is passed as a sum of two tensors of the inputs' dtype."""
    floor: Any
    """Lower clamp of the features."""
    far: Any
    softcap: Any
    sinks: Any
    block_s: Any
    sink_logit: Any
    ragged: Any
    """Rows have individual starts, lengths and first positions."""
    dot: Any
    """Operand dtype of q k^T, p v and x W."""
    piece: Any
    """Rows of a map read at a time; 0: programs hold maps whole."""
    low: Any
    """Operand dtype of products with far sums, features or gradients."""
    wide: Any
    """Widen rounded operands before a product: Triton's interpreter cannot multiply bfloat16. The result is the same as
    on hardware, which multiplies exactly."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, tl.constexpr(getattr(self, field.name)))


def features_of(c: Constants) -> int:
    """F, with each half rounded up to a power of two."""
    return int(c.block_p.value) * (2 if c.paired.value else 1)


def shared_bytes(c: Constants, itemsize: int) -> int:
    """A tight upper bound on the shared memory any kernel needs. Forward and transfer: two maps of two parts (or two
    slices of one, and of their tokens) plus tiles of the near part, or plus the far sum as an operand. The near part's
    backward: six tiles. `scripts/compile_kernels.py` prints what each kernel uses."""
    d, e, p, w, piece = (x.value for x in (c.block_d, c.block_e, c.block_p, c.block_w, c.piece))
    parts, features, tiles = 2 if c.split.value else 1, features_of(c), w * (d + 2 * max(d, e))
    local, near = 0 if c.kind.value == "terrace" else w, 0 if c.kind.value == "linear" else 6 * w * max(d, e)
    if not c.far.value:
        most = tiles
    elif piece:
        most = max(tiles, 2 * piece * (parts * p + w) + features * e + local * p)
    else:
        most = 2 * parts * d * p + max(tiles + local * features, features * e + local * p + w * d)
    return int(itemsize * max(near, most)) + 1024


LOG2E = tl.constexpr(1.4426950408889634)
"""Exponentials are powers of two: e^x takes four more instructions."""


WIDTH = tl.constexpr(16)
"""Columns of a count z, all equal: tensor cores compute the sums of features, and their tiles are at least this
wide."""


@triton.jit
def product(a, b, T: tl.constexpr, C: tl.constexpr, onto=None):
    """a @ b in float32, of operands rounded to T, added to `onto`."""
    a = a.to(T)
    b = b.to(T)
    if C.wide:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=onto, input_precision="ieee")


@triton.jit
def rounded(x, C: tl.constexpr):
    """An operand as `product` rounds it to `low`."""
    return x.to(C.low).to(tl.float32)


@triton.jit
def row_of(ROWS, r, C: tl.constexpr):
    """(start, length, position of the first token) of row r, in tokens."""
    start = 0
    length = ROWS[3]
    first = 0
    if C.ragged:
        start = tl.load(ROWS[0] + r)
        length = tl.load(ROWS[1] + r)
        first = tl.load(ROWS[2] + r)
    return start, length, first


@triton.jit
def place(X, r, h, start):
    """Address of the first token of row r, head h."""
    return X[0] + r.to(tl.int64) * X[1] + h.to(tl.int64) * X[2] + (start + tl.zeros([], tl.int64)) * X[3]


@triton.jit
def tokens_of(c, length, C: tl.constexpr):
    """(tokens of chunk c, mask of those that exist)."""
    i = tl.arange(0, C.block_w)
    token = c * C.window + i
    ok = (token >= 0) & (token < length)
    if C.block_w != C.window:
        ok = ok & (i < C.window)
    return token, ok


@triton.jit
def lines(X, r, h, start, token):
    """Addresses of the tokens' vectors."""
    return place(X, r, h, start) + token.to(tl.int64) * X[3]


@triton.jit
def load_tile(base, stride, token, ok, N: tl.constexpr, BLOCK: tl.constexpr):
    """[tokens, N], zeros where there is no token."""
    n = tl.arange(0, BLOCK)[None, :]
    there = ok[:, None]
    if N != BLOCK:
        there = there & (n < N)
    return tl.load(base + token[:, None].to(tl.int64) * stride + n, mask=there, other=0.0)


@triton.jit
def load_chunk(X, BOX, r, h, start, c, length, N: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Chunk c of row r, head h, [W, N], zeros where there is no token.

    BOX is a tensor descriptor of X, which reads zeros outside the tensor, or None.
    """
    if BOX is not None:
        x = tl.reshape(BOX.load([r, h, c * C.window, 0]), [C.block_w, BLOCK])
    else:
        token, ok = tokens_of(c, length, C)
        x = load_tile(place(X, r, h, start), X[3], token, ok, N, BLOCK)
    return x


@triton.jit
def store_tile(base, stride, token, ok, x, N: tl.constexpr, BLOCK: tl.constexpr):
    """Write [tokens, N] in the destination's dtype."""
    n = tl.arange(0, BLOCK)[None, :]
    there = ok[:, None]
    if N != BLOCK:
        there = there & (n < N)
    tl.store(base + token[:, None].to(tl.int64) * stride + n, x.to(base.dtype.element_ty), mask=there)


@triton.jit
def load_sinks(X, r, g, C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """[S, N] of row r, key/value head g; X is (pointer, stride of the row, of the head, of the sink)."""
    s = tl.arange(0, C.block_s)
    return load_tile(place(X, r, g, 0), X[3], s, s < C.sinks, N, BLOCK)


@triton.jit
def real_ones(ok, C: tl.constexpr):
    """[tokens, WIDTH] of ones at real tokens: phi(k)^T times this is the sum of phi(k)."""
    return tl.where(ok[:, None] & (tl.arange(0, WIDTH)[None, :] >= 0), 1.0, 0.0)


@triton.jit
def by_count(f, z, C: tl.constexpr):
    """phi . z [tokens] for z [P, WIDTH], whose columns are equal."""
    upper = z.to(C.low)
    den = product(f, upper, C.low, C)
    if C.split:
        den = product(f, z - upper.to(tl.float32), C.low, C, den)
    return tl.max(den, 1)


@triton.jit
def far_read(num, f, g, s1, s2, z1, z2, C: tl.constexpr):
    """(`num` plus the numerator, denominator) of the far keys in the sums."""
    num = product(f, s1, C.low, C, num)
    den = by_count(f, z1, C)
    if C.paired:
        num = product(g, s2, C.low, C, num)
        den += by_count(g, z2, C)
    return num, den


@triton.jit
def overlap(fq, gq, fk, gk, ok, C: tl.constexpr):
    """phi(q) . phi(k) of far pairs inside a chunk (linear) or across two (sliding): key column <= query row."""
    i = tl.arange(0, C.block_w)
    x = product(fq, tl.trans(fk), C.low, C)
    if C.paired:
        x = product(gq, tl.trans(gk), C.low, C, x)
    return rounded(tl.where((i[None, :] <= i[:, None]) & ok[None, :], x, 0.0), C)


@triton.jit
def exponent_unit(scale, C: tl.constexpr):
    """Factor that turns scores as the kernels keep them (products q k^T; after a soft-cap) into exponents of two."""
    if C.softcap:
        return scale * 0.0 + LOG2E
    else:
        return scale * LOG2E


@triton.jit
def load_logit(logit_ptr, h, unit, C: tl.constexpr):
    """The sink logit in the unit of the scores."""
    logit = 0.0
    if C.sink_logit:
        logit = tl.load(logit_ptr + h) * LOG2E / unit
    return logit


@triton.jit
def scores(q, k, seen, scale, cap, C: tl.constexpr):
    """Scores in the unit of :func:`exponent_unit`, -inf where not seen."""
    s = product(q, tl.trans(k), C.dot, C)
    if C.softcap:
        s = s * scale
        e = tl.exp2(tl.abs(s) / cap * (-2.0 * LOG2E))
        bent = cap * (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0, -bent, bent)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def near_start(query, C: tl.constexpr):
    """See :meth:`trenchcoat.ops.state.Rule.near_start`."""
    if C.kind == "terrace":
        start = tl.maximum((query // C.window - 1) * C.window, 0)
    elif C.kind == "sliding":
        start = tl.maximum(query - C.window + 1, 0)
    else:
        start = query + 1
    return start


@triton.jit
def seen_before(c, C: tl.constexpr):
    """Mask of the near keys in the chunk before: [query row, key column]."""
    i = tl.arange(0, C.block_w)
    seen = (i[None, :] < tl.where(c > 0, C.window, 0)) & (i[:, None] >= 0)
    if C.kind == "sliding":
        seen = seen & (i[None, :] > i[:, None])
    return seen


@triton.jit
def seen_sinks(position, C: tl.constexpr):
    """Mask of the sinks outside the window of the queries at `position`, which are added to the near part
    separately."""
    n = tl.arange(0, C.block_s)[None, :]
    return (n < C.sinks) & (n < near_start(position, C)[:, None])


@triton.jit
def window_scores(q, K, K_BOX, SINK_K, r, kv, start, logit, c, length, position, scale, cap, C: tl.constexpr):
    """(keys of the own chunk, the chunk before, the sinks; q's scores with the chunk before, the own chunk, the sinks;
    largest of all)."""
    k = load_chunk(K, K_BOX, r, kv, start, c, length, C.dim, C.block_d, C)
    before_k = load_chunk(K, K_BOX, r, kv, start, c - 1, length, C.dim, C.block_d, C)
    sink_k = k
    if C.sinks > 0:
        sink_k = load_sinks(SINK_K, r, kv, C, C.dim, C.block_d)
    i = tl.arange(0, C.block_w)
    own = scores(q, k, i[None, :] <= i[:, None], scale, cap, C)
    before = scores(q, before_k, seen_before(c, C), scale, cap, C)
    top = tl.maximum(tl.max(own, 1), tl.max(before, 1))
    sink = own
    if C.sinks > 0:
        sink = scores(q, sink_k, seen_sinks(position, C), scale, cap, C)
        top = tl.maximum(top, tl.max(sink, 1))
    if C.sink_logit:
        top = tl.maximum(top, logit)
    return k, before_k, sink_k, before, own, sink, top


@triton.jit
def weights(s, unit, top):
    """exp(s - c), where `top` is c as an exponent of two. The largest is 1, which is exact in 16 bits: multiplied by r,
    it would have the same rounding error for every query."""
    return tl.exp2(s * unit - top[:, None])


@triton.jit
def zero_sums(C: tl.constexpr):
    """(s1, s2 [P, E], z1, z2 [P, WIDTH]) of no keys."""
    s = tl.zeros([C.block_p, C.block_e], tl.float32)
    z = tl.zeros([C.block_p, WIDTH], tl.float32)
    return s, s, z, z


@triton.jit
def load_sums(START, row, C: tl.constexpr):
    """(s1, s2 [P, E], z1, z2 [P, WIDTH]) from START = (sums [rows, F, E] or None, [rows, F]); None: zeros."""
    p = tl.arange(0, C.block_p)
    e = tl.arange(0, C.block_e)[None, :]
    s1, s2, z1, z2 = zero_sums(C)
    if START[0] is not None:
        at = row.to(tl.int64) * C.features + p
        ok = (p[:, None] < C.columns) & (e < C.values)
        s1 = tl.load(START[0] + at[:, None] * C.values + e, mask=ok, other=0.0)
        z1 += tl.load(START[1] + at, mask=p < C.columns, other=0.0)[:, None]
        if C.paired:
            at += C.columns
            s2 = tl.load(START[0] + at[:, None] * C.values + e, mask=ok, other=0.0)
            z2 += tl.load(START[1] + at, mask=p < C.columns, other=0.0)[:, None]
    return s1, s2, z1, z2


@triton.jit
def store_sums(OUT, row, s1, s2, z1, z2, C: tl.constexpr):
    """The counterpart of `load_sums`."""
    p = tl.arange(0, C.block_p)
    e = tl.arange(0, C.block_e)[None, :]
    at = row.to(tl.int64) * C.features + p
    ok = (p[:, None] < C.columns) & (e < C.values)
    tl.store(OUT[0] + at[:, None] * C.values + e, s1, mask=ok)
    tl.store(OUT[1] + at, tl.max(z1, 1), mask=p < C.columns)
    if C.paired:
        at += C.columns
        tl.store(OUT[0] + at[:, None] * C.values + e, s2, mask=ok)
        tl.store(OUT[1] + at, tl.max(z2, 1), mask=p < C.columns)
