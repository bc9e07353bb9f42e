"""Feature maps inside a tile: the interface the operator needs, and the features of a tile's queries and keys.

Shape legend: for the letters of a tile see :mod:`trenchcoat.ops.chunked.tiles`; A heads and N tokens of a feature-map
block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from trenchcoat.ops.chunked.layout import TileWork
from trenchcoat.ops.chunked.tiles import Tile

W = TypeVar("W")

EVERY = slice(None)


class Phi(Protocol[W]):
    """A feature map that computes and differentiates one block of heads (see `students.feature_maps.FeatureMap`)."""

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
        """Views of the parameters of map `share` of each input head in `heads`, out of `inputs` heads."""
        ...


@dataclass(frozen=True)
class Learner(Generic[W]):
    """A feature map, its parameters, and the tensors their gradients are added to (None: no gradients)."""

    phi: Phi[W]
    weights: W
    grads: W | None = None


Learners = tuple[Learner[W], Learner[W]]
"""The learners of queries and keys."""


def fill(
    work: TileWork, tile: Tile, maps: Learners[W], late: slice = EVERY, early: slice = EVERY
) -> tuple[Tensor, Tensor]:
    """Features of the queries of chunks `late` [n, X, W, F] and of the keys of padded chunks `early` [m, 1 + X, W, F].

    Slot 0 of the keys holds the chunk before the tile if its keys can be far for the tile's own queries, else zeros.
    """
    (query, key), scratch = maps, tile.scratch
    total, window = tile.total, tile.window
    fq = scratch("fq", tile.n, total, window, query.phi.features)
    fk = scratch("fk", tile.m, 1 + total, window, key.phi.features)
    k = work.k[early]
    before = work.part.c0 > 0 and work.rule.kind == "sliding"
    if not before:
        fk[:, 0] = 0.0
    for j in range(tile.n):
        query.phi.block(by_group(work, work.q[j, late]), picked(work, query, j), by_group(work, fq[j]))
    for j in range(tile.m):
        weights = picked(work, key, j)
        if before:
            key.phi.block(k[:1], weights, fk[j, :1])
        key.phi.block(by_group(work, k[1:]), weights, by_group(work, fk[j, 1:]))
        clear_sinks(work, tile, fk[j])
    return fq, fk


def by_group(work: TileWork, x_XWD: Tensor) -> Tensor:
    """[X, W, dim] -> [g, tokens, dim]; a view."""
    return x_XWD.view(work.groups, -1, x_XWD.shape[-1])


def picked(work: TileWork, learner: Learner[W], j: int, *, grads: bool = False) -> W:
    """Parameters (or gradients) of the j-th map of each of the tile's key/value heads."""
    parameters = learner.grads if grads else learner.weights
    assert parameters is not None
    return learner.phi.pick(parameters, work.pack.kv_heads, work.part.g, j)


def clear_sinks(work: TileWork, tile: Tile, padded_xWF: Tensor) -> None:
    """Zero the entries of the first S tokens of each row."""
    if not work.rule.sinks:
        return
    for chunks, first in ((padded_xWF[1:], work.pack.t0), (padded_xWF[:1], work.pack.t0 - tile.window)):
        count = work.rule.sinks - first
        if first >= 0 and count > 0:
            rows = tile.rows if first == work.pack.t0 else 1
            chunks.view(rows, -1, chunks.shape[-1])[:, :count] = 0.0
