"""Attention transfer in closed form: squared error to the teacher's outputs and its gradients for maps and mix.

q, k, v and the teacher's y are constants, so the window part is one too: forward, loss and gradients are written out,
tile by tile, with nothing recomputed and no graph. A tile's features live only inside the tile.

Shape legend: B rows, H query heads = G * n, G key/value heads, T tokens, D key dim, E value dim; letters of a tile as
in :mod:`trenchcoat.ops.tiles`; A heads and N tokens of a feature-map block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from trenchcoat.ops.layout import TILE_TOKENS, Inputs, Work, parts
from trenchcoat.ops.state import Rule
from trenchcoat.ops.tiles import Scratch

W = TypeVar("W")


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
        y_hat, den = _forward(work, query, key)
        error = _error(work, y_hat, y_BHTE, length_B)
        total += torch.dot(error.flatten(), error.flatten())
        if den is not None and query is not None and key is not None and query.grads is not None:
            _backward(work, query, key, error, y_hat, den, 2.0 * error_scale, dlog_ratio_H)
    return total


def _sinks(x_BGTD: Tensor, rule: Rule) -> Tensor | None:
    """The first S tokens (zeros where the rows are shorter; no query sees those)."""
    if not rule.sinks:
        return None
    return torch.nn.functional.pad(x_BGTD[:, :, : rule.sinks], (0, 0, 0, max(0, rule.sinks - x_BGTD.shape[2])))


def _forward(work: Work, query: Learner[W] | None, key: Learner[W] | None) -> tuple[Tensor, Tensor | None]:
    """(y_hat [n, X, W, E], denominator [n, X, W] or None without a far part)."""
    tile, scratch = work.tile, work.tile.scratch
    if work.near:
        work.near_softmax()
    if query is None or key is None:
        return tile.near_only(work.p, work.near_v), None
    work.fq = scratch("fq", tile.n, tile.total, tile.window, query.phi.features)
    work.fk = scratch("fk", tile.m, 1 + tile.total, tile.window, key.phi.features)
    work.fk[:, 0] = 0.0
    for j in range(tile.n):
        query.phi.block(_by_group(work, work.q[j]), _picked(work, query, j), _by_group(work, work.fq[j]))
    for j in range(tile.m):
        fk = _by_group(work, work.fk[j, 1:])
        key.phi.block(_by_group(work, work.k[1:]), _picked(work, key, j), fk)
        _clear_sinks(work, work.fk[j])
    prefix = work.prefix(work.row_start())
    near = (work.p, work.near_v) if work.near else None
    y, den = tile.combine(near, work.fq, work.fk, work.v, prefix, work.ratio_nX)
    work.sums = prefix
    return y, den


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
    work: Work,
    query: Learner[W],
    key: Learner[W],
    error: Tensor,
    y_hat: Tensor,
    den: Tensor,
    scale: float,
    dlog_ratio_H: Tensor | None,
) -> None:
    """Error to gradients; `error`, `y_hat` and `den` are used up."""
    tile = work.tile
    dnum = error.mul_(den.reciprocal_().mul_(scale)[..., None])
    dden = y_hat.mul_(dnum).sum(-1).neg_()
    dfq, dfk, _ = tile.feature_gradients(work.fq, work.fk, work.v, work.sums, dnum, dden, None)
    if dlog_ratio_H is not None and work.near:
        work.add_per_head(dlog_ratio_H, torch.mul(dfq, work.fq, out=tile.scratch("weighted", *dfq.shape)), -1.0)
    for j in range(tile.n):
        q, fq, df = (_by_group(work, t[j]) for t in (work.q, work.fq, dfq))
        query.phi.block_backward(q, _picked(work, query, j), fq, df, _picked(work, query, j, grads=True), False)
    for j in range(tile.m):
        _clear_sinks(work, dfk[j])
        k, fk, df = (_by_group(work, t[1:]) for t in (work.k, work.fk[j], dfk[j]))
        key.phi.block_backward(k, _picked(work, key, j), fk, df, _picked(work, key, j, grads=True), False)


def _by_group(work: Work, x_XWD: Tensor) -> Tensor:
    """[X, W, dim] -> [g, tokens, dim]; a view."""
    return x_XWD.view(work.groups, -1, x_XWD.shape[-1])


def _picked(work: Work, learner: Learner[W], j: int, *, grads: bool = False) -> W:
    parameters = learner.grads if grads else learner.weights
    assert parameters is not None
    return learner.phi.pick(parameters, work.pack.kv_heads, work.part.g, j)


def _clear_sinks(work: Work, padded_xWF: Tensor) -> None:
    """Zero what belongs to the first S tokens of each row."""
    if work.rule.sinks:
        tile = work.tile
        padded_xWF[1:].view(tile.rows, tile.chunks * tile.window, -1)[:, : work.rule.sinks] = 0.0
