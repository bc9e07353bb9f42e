"""Attention transfer in closed form: squared error to the teacher's outputs and its gradients for maps and mix.

q, k, v and the teacher's y are constants, so the window part is constant too: forward, loss and gradients are computed
explicitly, tile by tile, with no recomputation and no autograd graph. A tile's features exist only inside the tile.

Shape legend: B rows, H query heads = G * n, G key/value heads, T tokens, D key dim, E value dim; for the letters of a
tile see :mod:`trenchcoat.ops.chunked.tiles`; A heads and N tokens of a feature-map block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from trenchcoat.ops.chunked.layout import TILE_TOKENS, Inputs, TilePart, TileWork, parts
from trenchcoat.ops.chunked.maps import Learner, Learners, by_group, clear_sinks, fill, picked
from trenchcoat.ops.chunked.rows import first_tokens
from trenchcoat.ops.chunked.tiles import Scratch, Tile, bmm_shared, run_tiles
from trenchcoat.ops.state import HeadWeights, Rule, Tokens

W = TypeVar("W")

ATTEND_TOKENS = 8192
"""Query rows (heads x tokens) of a tile when nothing is saved for a backward pass."""


def transfer_error(
    tokens: Tokens,
    y_BHTE: Tensor,
    maps: Learners[W] | None,
    heads: HeadWeights,
    rule: Rule,
    *,
    length_B: Tensor | None = None,
    error_scale: float = 1.0,
    dlog_ratio_H: Tensor | None = None,
) -> Tensor:
    """Sum of (y - y_hat)^2 over real tokens, 0-d; adds the gradients of `error_scale` times it to the learners' grads.

    Rows must have no padding between tokens; `length_B` int64 is their token count (None: all T). `maps` None: no far
    part.
    """
    q, k, v = tokens.q_BHTD, tokens.k_BGTD, tokens.v_BGTE
    wide = torch.promote_types(q.dtype, torch.float32)
    first_B = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    sinks = first_tokens(k, rule), first_tokens(v, rule)
    x = Inputs(q, k, v, None, None, rule.log_ratio(heads.mix_H), heads.sink_logit_H, *sinks, first_B, None)

    def work(part: TilePart, scratch: Scratch) -> Tensor:
        """Squared error of one tile; its gradients are added."""
        tile, y_hat = _opened(x, rule, part, scratch, maps)
        far = _forward(tile, maps, y_hat)
        error = _error(tile, y_hat, y_BHTE, length_B)
        squares = torch.dot(error.flatten(), error.flatten())
        if far is not None and far.query.grads is not None:
            _backward(tile, far, error, y_hat, 2.0 * error_scale, dlog_ratio_H)
        return squares

    squares = run_tiles(_tiles(x, rule, TILE_TOKENS), work, device=q.device, dtype=wide, purpose="transfer")
    return torch.stack(squares).sum()


def _opened(
    x: Inputs, rule: Rule, part: TilePart, scratch: Scratch, maps: Learners[W] | None
) -> tuple[TileWork, Tensor]:
    """A tile, and scratch for its outputs."""
    tile = TileWork(x, rule, part, scratch, None if maps is None else maps[1].phi.num_heads)
    return tile, scratch("y", tile.tile.n, tile.tile.total, rule.window, x.v_BGTE.shape[-1])


def _tiles(x: Inputs, rule: Rule, budget: int) -> Iterator[TilePart]:
    """Tiles of about `budget` query rows, unless one head has more; rows are never split here."""
    batch, heads, tokens, _ = x.q_BHTD.shape
    kv_heads, chunks = x.k_BGTD.shape[1], -(-tokens // rule.window)
    return parts(batch, kv_heads, heads // kv_heads, chunks, rule.window, budget, whole_rows=True)


def attend(x: Inputs, maps: Learners[W], rule: Rule) -> Tensor:
    """y [B, H, T, E] in q's dtype, without autograd, features computed inside the tiles; fast for short rows only."""
    batch, heads, tokens, _ = x.q_BHTD.shape
    y = x.q_BHTD.new_empty(batch, heads, tokens, x.v_BGTE.shape[-1])

    def work(part: TilePart, scratch: Scratch) -> None:
        """One tile of y."""
        tile, y_hat = _opened(x, rule, part, scratch, maps)
        _forward(tile, maps, y_hat)
        tile.pack.unpack(y_hat, y)

    wide = torch.promote_types(x.q_BHTD.dtype, torch.float32)
    run_tiles(_tiles(x, rule, ATTEND_TOKENS), work, device=y.device, dtype=wide, purpose="attend")
    return y


@dataclass(frozen=True)
class _Far(Generic[W]):
    """The far part of a tile: the chunks of queries with far keys, and the chunks of keys that are far for some
    query."""

    tile: Tile
    query: Learner[W]
    key: Learner[W]
    late: slice
    """Chunks of the queries."""
    early: slice
    """Padded chunks of the keys."""
    fq: Tensor
    fk: Tensor
    sums: tuple[Tensor, Tensor]
    den: Tensor


def _forward(work: TileWork, maps: Learners[W] | None, y_hat: Tensor) -> _Far[W] | None:
    """Fills y_hat [n, X, W, E]; the far part is None if no query has far keys.

    In a tile of one row only later chunks of queries and earlier chunks of keys have a far part, in pairs.
    """
    tile = work.tile
    if work.near:
        work.near_softmax()
    paired = work.rule.kind == "terrace" and tile.rows == 1
    skip = tile.lag if paired else 0
    if maps is None or (work.rule.kind == "terrace" and tile.chunks <= tile.lag):
        bmm_shared(work.p, work.near_v[None], y_hat)
        return None
    late, early = slice(skip, tile.total), slice(0, 1 + tile.total - skip)
    far_tile = replace(tile, chunks=tile.chunks - skip, lag=0) if paired else tile
    fq, fk = fill(work, far_tile, maps, late, early)
    sums = far_tile.prefix_sums(fk, work.v[early], work.row_start(maps[1].phi.features))
    near = (work.p[:, late], work.near_v[late]) if work.near else None
    if skip:
        bmm_shared(work.p[:, :skip], work.near_v[None, :skip], y_hat[:, :skip])
    den = far_tile.combine(near, fq, fk, work.v[early], sums, work.ratio_nX[:, late], y_hat[:, late])
    return _Far(far_tile, *maps, late, early, fq, fk, sums, den)


def _error(work: TileWork, y_hat: Tensor, y_BHTE: Tensor, length_B: Tensor | None) -> Tensor:
    """y_hat - y in tile layout, 0 where there is no token."""
    tile, pack = work.tile, work.pack
    error = tile.scratch("error", *y_hat.shape)
    tokens = pack.t1 - pack.t0
    flat, flat_hat = pack.flat(error), pack.flat(y_hat)
    torch.sub(flat_hat[:, :, :, :tokens], pack.view(y_BHTE, pack.t0, pack.t1), out=flat[:, :, :, :tokens])
    flat[:, :, :, tokens:] = 0.0
    if length_B is not None:
        token = torch.arange(flat.shape[3], device=flat.device)
        flat.masked_fill_((token >= length_B[work.part.b, None])[..., None], 0.0)
    return error


def _backward(
    work: TileWork, far: _Far[W], error: Tensor, y_hat: Tensor, scale: float, dlog_ratio_H: Tensor | None
) -> None:
    """Gradients from the error; overwrites `error`, `y_hat` and the denominators, and reuses the window's scratch."""
    dnum = error[:, far.late].mul_(far.den.reciprocal_().mul_(scale)[..., None])
    dden = y_hat[:, far.late].mul_(dnum).sum(-1).neg_()
    v = work.v[far.early]
    dfq, dfk, _ = far.tile.feature_gradients(far.fq, far.fk, v, far.sums, dnum, dden, None, ("scores", "p"))
    if dlog_ratio_H is not None and work.near:
        per_head = zip(dfq.view(far.tile.n * work.groups, -1), far.fq.view(far.tile.n * work.groups, -1), strict=True)
        pull_ng = torch.stack([torch.dot(df, f) for df, f in per_head]).view(far.tile.n, work.groups)
        dlog_ratio_H.view(-1, far.tile.n)[work.part.g].sub_(pull_ng.mT)
    for j in range(far.tile.n):
        q, fq, df = (by_group(work, t) for t in (work.q[j, far.late], far.fq[j], dfq[j]))
        grads = picked(work, far.query, j, grads=True)
        far.query.phi.block_backward(q, picked(work, far.query, j), fq, df, grads, False)
    for j in range(far.tile.m):
        clear_sinks(work, far.tile, dfk[j])
        k, fk, df = (by_group(work, t[1:]) for t in (work.k[far.early], far.fk[j], dfk[j]))
        grads = picked(work, far.key, j, grads=True)
        far.key.phi.block_backward(k, picked(work, far.key, j), fk, df, grads, False)
