"""The operator in O(T) time and memory: chunks of W tokens, tiles that fit in cache, a hand-written backward.

The forward saves q, k, v, the features, y, the denominators and the running sums at tile starts; the backward
recomputes the rest. When only features and mix need gradients, the window part of the backward is skipped.

Rows must start at a chunk boundary and have no padding between tokens (:mod:`trenchcoat.ops.chunked.rows` ensures
both).

Shape legend: as in :mod:`trenchcoat.ops.chunked.layout` and :mod:`trenchcoat.ops.chunked.tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trenchcoat.ops.chunked.layout import TILE_TOKENS, Inputs, TilePart, TileWork, grouped, parts
from trenchcoat.ops.chunked.maps import Learners, fill
from trenchcoat.ops.chunked.tiles import Scratch, bmm_shared, run_tiles
from trenchcoat.ops.state import Rule

W = TypeVar("W")


@dataclass(frozen=True)
class _Kept:
    """What the backward needs besides the inputs: y and the denominator in full precision, sums at tile starts."""

    y_BHTE: Tensor
    den_BHT: Tensor | None
    starts: list[Tensor]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: Rule, first_B: Tensor | None, s0: Tensor | None, z0: Tensor | None, *args: Any
    ) -> Tensor:
        """y, and what the backward needs."""
        x = Inputs(*[*args, first_B, None if s0 is None or z0 is None else (s0, z0)])
        y, kept = _forward(x, rule, keep=any(ctx.needs_input_grad))
        if kept is not None:
            ctx.rule, ctx.count = rule, len(args)
            ctx.save_for_backward(first_B, s0, z0, kept.y_BHTE, kept.den_BHT, *args, *kept.starts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that require one."""
        first_B, s0, z0, y, den, *rest = ctx.saved_tensors
        args, starts = rest[: ctx.count], list(rest[ctx.count :])
        x = Inputs(*[*args, first_B, None if s0 is None else (s0, z0)])
        grads: list[Tensor | None] = [
            torch.zeros_like(t, dtype=y.dtype) if need and t is not None else None
            for t, need in zip(args, ctx.needs_input_grad[4:], strict=True)
        ]
        _backward(x, ctx.rule, dy, _Kept(y, den, starts), grads)
        cast = [None if g is None else g.to(t.dtype) for g, t in zip(grads, args, strict=True)]
        return None, None, None, None, *cast


def aligned_attention(x: Inputs, rule: Rule) -> Tensor:
    """y [B, H, T, E] in q's dtype for aligned rows, differentiable in everything but the state."""
    s0, z0 = (None, None) if x.start is None else x.start
    tensors = (x.q_BHTD, x.k_BGTD, x.v_BGTE, x.fq_BHTF, x.fk_BKTF, x.log_ratio_H)
    sinks = (x.sink_logit_H, x.sink_k_BGSD, x.sink_v_BGSE)
    y: Tensor = _Attention.apply(rule, x.first_B, s0, z0, *tensors, *sinks)
    return y


def attend(x: Inputs, maps: Learners[W], rule: Rule) -> Tensor:
    """y [B, H, T, E] in q's dtype, without autograd; features are computed inside the tiles."""
    return _forward(x, rule, keep=False, maps=maps)[0]


def _chains(x: Inputs, rule: Rule) -> list[list[TilePart]]:
    """Tiles grouped by row: each starts from the sums of the previous one."""
    batch, heads, tokens, _ = x.q_BHTD.shape
    kv_heads, chunks = x.k_BGTD.shape[1], -(-tokens // rule.window)
    tiles = parts(batch, kv_heads, heads // kv_heads, chunks, rule.window, TILE_TOKENS)
    return grouped(tiles, lambda part: (part.b.start, part.g.start))


def _forward(x: Inputs, rule: Rule, *, keep: bool, maps: Learners[W] | None = None) -> tuple[Tensor, _Kept | None]:
    batch, heads, tokens, _ = x.q_BHTD.shape
    wide = torch.promote_types(x.q_BHTD.dtype, torch.float32)
    y = x.q_BHTD.new_empty(batch, heads, tokens, x.v_BGTE.shape[-1])
    exact = y if y.dtype == wide or not keep else torch.empty_like(y, dtype=wide)
    den = y.new_empty(batch, heads, tokens, dtype=wide) if keep and rule.far else None

    def work(tiles: list[TilePart], scratch: Scratch) -> list[Tensor]:
        """Run the tiles of a row in order; returns the sums that later tiles start from."""
        starts: list[Tensor] = []
        carry: tuple[Tensor, Tensor] | None = None
        for part in tiles:
            tile = TileWork(x, rule, part, scratch, None if maps is None else maps[1].phi.num_heads)
            if maps is not None and rule.far:
                tile.fq, tile.fk = fill(tile, tile.tile, maps)
            tile_y, tile_den, carry = _forward_tile(tile, carry, starts if keep else None)
            tile.pack.unpack(tile_y, y)
            if exact is not y:
                tile.pack.unpack(tile_y, exact)
            if den is not None and tile_den is not None:
                tile.pack.unpack(tile_den, den)
        return starts

    starts = run_tiles(_chains(x, rule), work, device=y.device, dtype=wide, purpose="forward")
    return y, _Kept(exact, den, list(chain.from_iterable(starts))) if keep else None


def _backward(x: Inputs, rule: Rule, dy: Tensor, kept: _Kept, grads: list[Tensor | None]) -> None:
    """Adds to `grads`, in the order of `aligned_attention`."""
    taken = 0

    def work(tiles: list[TilePart], scratch: Scratch) -> None:
        """Run the tiles of a row from last to first."""
        nonlocal taken
        count = 2 * (len(tiles) - 1) if rule.far else 0
        starts = kept.starts[taken : taken + count]
        taken += count
        after: tuple[Tensor, Tensor] | None = None
        for part in reversed(tiles):
            tile = TileWork(x, rule, part, scratch)
            after = _backward_tile(tile, dy, kept.y_BHTE, kept.den_BHT, starts, after, grads)

    run_tiles(_chains(x, rule), work, device=dy.device, dtype=kept.y_BHTE.dtype, purpose="backward")


def _forward_tile(
    work: TileWork, carry: tuple[Tensor, Tensor] | None, starts: list[Tensor] | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(y, denominator, sums at the next tile's start); the sums this tile started from are appended to `starts`."""
    tile = work.tile
    if work.near:
        work.near_softmax()
    y = tile.scratch("y", tile.n, tile.total, tile.window, work.v.shape[-1])
    if not work.rule.far:
        return (bmm_shared(work.p, work.near_v[None], y) if work.near else y.zero_()), None, None
    if work.part.c0 == 0:
        carry = work.row_start(work.fk.shape[-1])
    assert carry is not None
    if starts is not None and work.part.c0:
        starts.extend(carry)
    prefix = tile.prefix_sums(work.fk, work.v, carry)
    near = (work.p, work.near_v) if work.near else None
    den = tile.combine(near, work.fq, work.fk, work.v, prefix, work.ratio_nX, y)
    if work.part.last:
        return y, den, None
    tail = slice(tile.total, tile.total + tile.lag)
    return y, den, (prefix[0][:, None, tail].clone(), prefix[1][:, None, tail].clone())


def _backward_tile(
    work: TileWork,
    dy_BHTE: Tensor,
    y_BHTE: Tensor,
    den_BHT: Tensor | None,
    starts: list[Tensor],
    after: tuple[Tensor, Tensor] | None,
    grads: list[Tensor | None],
) -> tuple[Tensor, Tensor] | None:
    """Adds the tile's gradients to `grads`; returns what the preceding tile of the row needs."""
    tile, scratch, pack, rule = work.tile, work.tile.scratch, work.pack, work.rule
    dq, dk, dv, dfq_BHTF, dfk_BKTF, dratio_H, dlogit_H, dsink_k, dsink_v = grads
    shape = (tile.n, tile.total, tile.window)
    y = pack.queries(y_BHTE, scratch("y", *shape, y_BHTE.shape[-1]))
    dnum = pack.queries(dy_BHTE, scratch("dnum", *shape, y_BHTE.shape[-1]))
    near_grads = work.near and any(g is not None for g in (dq, dk, dv, dlogit_H, dsink_k, dsink_v))
    max_grad = y.new_zeros(()).expand(shape)
    suffix = None
    dv_pad = scratch("dv", 1, 1 + tile.total, tile.window, y.shape[-1]).zero_() if dv is not None else None
    if work.near:
        work.near_softmax()
    if rule.far:
        assert den_BHT is not None
        den = pack.queries(den_BHT, scratch("den", *shape))
        den.masked_fill_(den == 0, 1.0)
        dnum.div_(den[..., None])
        dden = torch.mul(dnum, y, out=y).sum(-1).neg_()
        start = work.row_start(work.fk.shape[-1]) if work.part.c0 == 0 else (starts[-2], starts[-1])
        if work.part.c0:
            del starts[-2:]
        prefix = tile.prefix_sums(work.fk, work.v, start)
        dfq, dfk, suffix = tile.feature_gradients(work.fq, work.fk, work.v, prefix, dnum, dden, after)
        max_grad = torch.mul(dfq, work.fq, out=scratch("weighted", *dfq.shape)).sum(-1)
        if dratio_H is not None and work.near:
            work.add_per_head(dratio_H, max_grad, -1.0)
        if dfq_BHTF is not None:
            pack.unpack(dfq, dfq_BHTF)
        if dfk_BKTF is not None:
            pack.add_keys(dfk, dfk_BKTF)
        if dv_pad is not None:
            bmm_shared(work.fk[:, 1:], suffix[0][:, tile.lag :], dv_pad[:, 1:])
            if rule.kind != "terrace":
                local = tile.local_weights(work.fq, work.fk)
                bmm_shared(local.mT, dnum, tile.local_pairs(dv_pad), accumulate=True)
    else:
        dden = torch.mul(dnum, y, out=y).sum(-1).neg_()
    if near_grads:
        _near_backward(work, dnum, dden, max_grad, dv_pad, grads)
    if dv is not None and dv_pad is not None:
        pack.add_keys(dv_pad, dv)
    if suffix is None or work.part.c0 == 0:
        return None
    return suffix[0][:, : tile.lag].clone(), suffix[1][:, : tile.lag].clone()


def _near_backward(
    work: TileWork,
    dnum_nXWE: Tensor,
    dden_nXW: Tensor,
    pull_nXW: Tensor,
    dv_pad: Tensor | None,
    grads: list[Tensor | None],
) -> None:
    """Gradients through the window: w = r exp(s - c), ds = w dw, and at the largest score minus the row's sum of w dw.

    y does not change when numerator and denominator are scaled alike, so that sum is `-max_grad`, the negative of the
    far part's: sum_j w_j dw_j + sum_f dphi_f phi_f = 0.
    """
    tile, rule, scratch, x = work.tile, work.rule, work.tile.scratch, work.x
    dq, dk, _, _, _, _, dlogit_H, dsink_k, dsink_v = grads
    p, window = work.p, tile.window
    top = torch.amax(p, -1, out=scratch("top", *p.shape[:-1]))
    dscores = scratch("dscores", *p.shape)
    for j in range(tile.n):
        bias = dden_nXW[j, :, :, None].expand(p.shape[1:])
        torch.baddbmm(bias, dnum_nXWE[j], work.near_v.mT, out=dscores[j])
    largest = (p == top[..., None]).to(p.dtype)
    weight = torch.div(work.ratio_nX[..., None], top) if rule.far else torch.ones_like(top)
    weights = p.mul_(weight[..., None])
    dscores.mul_(weights).addcmul_(largest, (pull_nXW / largest.sum(-1))[..., None])
    if dv_pad is not None or dsink_v is not None:
        dnear_v = bmm_shared(weights.mT, dnum_nXWE, scratch("dnear_v", 1, *work.near_v.shape))[0]
        if dv_pad is not None:
            _fold_near(dnear_v, dv_pad[0], window)
        _add_sinks(work, dnear_v, dsink_v)
    if dlogit_H is not None:
        work.add_per_head(dlogit_H, dscores[..., -1])
    if rule.softcap is not None:
        keys = slice(0, p.shape[-1] - (x.sink_logit_H is not None))
        bent = work.scores[..., keys].clamp_(min=-rule.softcap).div_(rule.softcap)
        dscores[..., keys].mul_(1 - bent.square_())
    dscores.mul_(rule.scale)
    if dq is not None:
        work.pack.unpack(bmm_shared(dscores, work.near_k[None], scratch("dq", *work.q.shape)), dq)
    if dk is not None or dsink_k is not None:
        dnear_k = bmm_shared(dscores.mT, work.q, scratch("dnear_k", 1, *work.near_k.shape))[0]
        if dk is not None:
            dk_pad = scratch("dk", 1, *work.k.shape).zero_()
            _fold_near(dnear_k, dk_pad[0], window)
            work.pack.add_keys(dk_pad, dk)
        _add_sinks(work, dnear_k, dsink_k)


def _fold_near(dnear_XJD: Tensor, padded_xWD: Tensor, window: int) -> None:
    """Add gradients of [previous chunk | own chunk | ...] to the chunks."""
    padded_xWD[1:].add_(dnear_XJD[:, window : 2 * window])
    padded_xWD[:-1].add_(dnear_XJD[:, :window])


def _add_sinks(work: TileWork, dnear_XJD: Tensor, grad_BGSD: Tensor | None) -> None:
    if grad_BGSD is None:
        return
    window, part = work.tile.window, work.part
    columns = dnear_XJD[:, 2 * window : 2 * window + grad_BGSD.shape[2]]
    by_row = columns.unflatten(0, (work.tile.rows, work.tile.chunks)).sum(1)
    rows = by_row.unflatten(0, (part.g.stop - part.g.start, -1)).movedim(0, 1)
    grad_BGSD[part.b, part.g].add_(rows)
