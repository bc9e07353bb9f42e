"""Attention transfer in closed form: squared error to the teacher's outputs and its gradients for maps and mix.

q, k, v and the teacher's y are constants, so the window part is one too: forward, loss and gradients are written out,
tile by tile, with nothing recomputed and no graph. A tile's features live only inside the tile.

Shape legend: B rows, H query heads = G * n, G key/value heads, T tokens, D key dim, E value dim; letters of a tile as
in :mod:`trenchcoat.ops.tiles`; A heads and N tokens of a feature-map block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from trenchcoat.ops.layout import Inputs, Work, parts
from trenchcoat.ops.state import Rule
from trenchcoat.ops.tiles import Scratch, Tile, bmm_shared

W = TypeVar("W")

TILE_TOKENS = 1024
"""Query rows (heads x tokens) of a tile, unless one head has more; rows are never cut here."""


class Phi(Protocol[W]):
    """A feature map that runs and differentiates one block of heads (see `students.feature_maps.FeatureMap`)."""

    num_heads: int

    @property
    def features(self) -> int:
        """F."""
        ...

    def block(self, x_AND: Tensor, w: W, out_ANF: Tensor) -> Tensor:
        """Fill `out` with the features of x."""
        ...

    def block_backward(
        self, x_AND: Tensor, w: W, f_ANF: Tensor, df_ANF: Tensor, grads: W | None, need_dx: bool
    ) -> Tensor | None:
        """Add parameter gradients to `grads`; may overwrite df."""
        ...

    def pick(self, w: W, inputs: int, heads: slice, share: int) -> W:
        """Parameters of map `share` of each of the input heads `heads`, of `inputs` in all; views."""
        ...


@dataclass(frozen=True)
class Learner(Generic[W]):
    """A feature map, its parameters, and where their gradients are added (None: only the loss is wanted)."""

    phi: Phi[W]
    weights: W
    grads: W | None


def transfer(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    y_BHTE: Tensor,
    query: Learner[W] | None,
    key: Learner[W] | None,
    log_ratio_H: Tensor,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    length_B: Tensor | None = None,
    error_scale: float = 1.0,
    dlog_ratio_H: Tensor | None = None,
) -> Tensor:
    """Sum of (y - y_hat)^2 over real tokens, 0-d; adds the gradients of `error_scale` times it to the learners' grads.

    Rows must be free of holes; `length_B` int64 gives their tokens (None: all T). `query`/`key` None: no far part.
    """
    batch, heads, tokens, _ = q_BHTD.shape
    kv_heads = k_BGTD.shape[1]
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    scratch = Scratch(q_BHTD.device, wide)
    first_B = torch.zeros(batch, dtype=torch.int64, device=q_BHTD.device)
    sinks = _sinks(k_BGTD, rule), _sinks(v_BGTE, rule)
    x = Inputs(q_BHTD, k_BGTD, v_BGTE, None, None, log_ratio_H, sink_logit_H, *sinks, first_B, None)
    total = torch.zeros((), dtype=wide, device=q_BHTD.device)
    chunks = -(-tokens // rule.window)
    for part in parts(batch, kv_heads, heads // kv_heads, chunks, rule.window, TILE_TOKENS, whole_rows=True):
        work = Work(x, rule, part, scratch, key.phi.num_heads if key is not None else None)
        y_hat = scratch("y", work.tile.n, work.tile.total, rule.window, v_BGTE.shape[-1])
        far = _forward(work, query, key, y_hat)
        error = _error(work, y_hat, y_BHTE, length_B)
        total += torch.dot(error.flatten(), error.flatten())
        if far is not None and far.query.grads is not None:
            _backward(work, far, error, y_hat, 2.0 * error_scale, dlog_ratio_H)
    return total


@dataclass(frozen=True)
class _Far(Generic[W]):
    """The far part of a tile: the chunks of queries that have far keys, the chunks of keys that are far for someone."""

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


def _sinks(x_BGTD: Tensor, rule: Rule) -> Tensor | None:
    """The first S tokens (zeros where the rows are shorter; no query sees those)."""
    if not rule.sinks:
        return None
    return torch.nn.functional.pad(x_BGTD[:, :, : rule.sinks], (0, 0, 0, max(0, rule.sinks - x_BGTD.shape[2])))


def _forward(work: Work, query: Learner[W] | None, key: Learner[W] | None, y_hat: Tensor) -> _Far[W] | None:
    """Fills y_hat [n, X, W, E]; the far part is None where no query has far keys.

    In a tile of one row only later chunks of queries and earlier chunks of keys have a far part, in pairs.
    """
    tile, scratch = work.tile, work.tile.scratch
    if work.near:
        work.near_softmax()
    paired = work.rule.kind == "terrace" and tile.rows == 1
    skip = tile.lag if paired else 0
    if query is None or key is None or (work.rule.kind == "terrace" and tile.chunks <= tile.lag):
        bmm_shared(work.p, work.near_v[None], y_hat)
        return None
    late, early = slice(skip, tile.total), slice(0, 1 + tile.total - skip)
    far_tile = replace(tile, chunks=tile.chunks - skip, lag=0) if paired else tile
    fq = scratch("fq", tile.n, far_tile.total, tile.window, query.phi.features)
    fk = scratch("fk", tile.m, 1 + far_tile.total, tile.window, key.phi.features)
    fk[:, 0] = 0.0
    for j in range(tile.n):
        query.phi.block(_by_group(work, work.q[j, late]), _picked(work, query, j), _by_group(work, fq[j]))
    for j in range(tile.m):
        key.phi.block(_by_group(work, work.k[early][1:]), _picked(work, key, j), _by_group(work, fk[j, 1:]))
        _clear_sinks(work, far_tile, fk[j])
    sums = far_tile.prefix_sums(fk, work.v[early], work.row_start(key.phi.features))
    near = (work.p[:, late], work.near_v[late]) if work.near else None
    if skip:
        bmm_shared(work.p[:, :skip], work.near_v[None, :skip], y_hat[:, :skip])
    den = far_tile.combine(near, fq, fk, work.v[early], sums, work.ratio_nX[:, late], y_hat[:, late])
    return _Far(far_tile, query, key, late, early, fq, fk, sums, den)


def _error(work: Work, y_hat: Tensor, y_BHTE: Tensor, length_B: Tensor | None) -> Tensor:
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
    work: Work, far: _Far[W], error: Tensor, y_hat: Tensor, scale: float, dlog_ratio_H: Tensor | None
) -> None:
    """Error to gradients; `error`, `y_hat` and the denominators are used up, and the window's scratch is reused."""
    dnum = error[:, far.late].mul_(far.den.reciprocal_().mul_(scale)[..., None])
    dden = y_hat[:, far.late].mul_(dnum).sum(-1).neg_()
    v = work.v[far.early]
    dfq, dfk, _ = far.tile.feature_gradients(far.fq, far.fk, v, far.sums, dnum, dden, None, ("scores", "p"))
    if dlog_ratio_H is not None and work.near:
        per_head = zip(dfq.view(far.tile.n * work.groups, -1), far.fq.view(far.tile.n * work.groups, -1), strict=True)
        pull_ng = torch.stack([torch.dot(df, f) for df, f in per_head]).view(far.tile.n, work.groups)
        dlog_ratio_H.view(-1, far.tile.n)[work.part.g].sub_(pull_ng.mT)
    for j in range(far.tile.n):
        q, fq, df = (_by_group(work, t) for t in (work.q[j, far.late], far.fq[j], dfq[j]))
        grads = _picked(work, far.query, j, grads=True)
        far.query.phi.block_backward(q, _picked(work, far.query, j), fq, df, grads, False)
    for j in range(far.tile.m):
        _clear_sinks(work, far.tile, dfk[j])
        k, fk, df = (_by_group(work, t[1:]) for t in (work.k[far.early], far.fk[j], dfk[j]))
        grads = _picked(work, far.key, j, grads=True)
        far.key.phi.block_backward(k, _picked(work, far.key, j), fk, df, grads, False)


def _by_group(work: Work, x_XWD: Tensor) -> Tensor:
    """[X, W, dim] -> [g, tokens, dim]; a view."""
    return x_XWD.view(work.groups, -1, x_XWD.shape[-1])


def _picked(work: Work, learner: Learner[W], j: int, *, grads: bool = False) -> W:
    parameters = learner.grads if grads else learner.weights
    assert parameters is not None
    return learner.phi.pick(parameters, work.pack.kv_heads, work.part.g, j)


def _clear_sinks(work: Work, tile: Tile, padded_xWF: Tensor) -> None:
    """Zero what belongs to the first S tokens of each row."""
    if work.rule.sinks:
        padded_xWF[1:].view(tile.rows, tile.chunks * tile.window, -1)[:, : work.rule.sinks] = 0.0
