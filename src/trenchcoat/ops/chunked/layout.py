"""How rows are split into tiles and copied to tile layout and back; shared by the chunkwise implementations.

Shape legend: B rows, H query heads = G * n, G key/value heads, K key maps (G or H), T tokens, S sinks; for the letters
of a tile see :mod:`trenchcoat.ops.chunked.tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trenchcoat.ops.chunked.tiles import Scratch, Tile
from trenchcoat.ops.state import Rule

TILE_TOKENS = 4096
"""Query rows (heads x tokens) of a tile; at D = 64, F = 128 its arrays then fit a 32 MB last-level cache."""


@dataclass(frozen=True)
class TilePart:
    """The batch rows, key/value heads and chunks of a tile."""

    b: slice
    g: slice
    c0: int
    c1: int
    last: bool


def parts(
    batch: int,
    kv_heads: int,
    shared: int,
    chunks: int,
    window: int,
    budget: int,
    *,
    whole_rows: bool = False,
) -> Iterator[TilePart]:
    """Tiles of about `budget` query rows, ordered so that the tiles of a long row are consecutive.

    `whole_rows`: never split a row, however long.
    """
    row = shared * chunks * window
    if row >= budget:
        pieces = 1 if whole_rows else max(1, round(row / budget))
        size = -(-chunks // pieces)
        for b in range(batch):
            for g in range(kv_heads):
                for c in range(0, chunks, size):
                    yield TilePart(slice(b, b + 1), slice(g, g + 1), c, min(c + size, chunks), c + size >= chunks)
        return
    fit = max(1, budget // row)
    heads = min(fit, kv_heads)
    rows = max(1, fit // heads)
    for b in range(0, batch, rows):
        for g in range(0, kv_heads, heads):
            b_slice, g_slice = slice(b, min(b + rows, batch)), slice(g, min(g + heads, kv_heads))
            yield TilePart(b_slice, g_slice, 0, chunks, True)


def grouped(tiles: Iterable[TilePart], key: Callable[[TilePart], Any]) -> list[list[TilePart]]:
    """Tiles grouped by key, in order; tiles of different groups may run in parallel."""
    groups: dict[Any, list[TilePart]] = {}
    for part in tiles:
        groups.setdefault(key(part), []).append(part)
    return list(groups.values())


class Packer:
    """Copies parts of [B, heads, T, dim] tensors into tile layout (query heads sharing keys outermost) and back."""

    def __init__(self, part: TilePart, tokens: int, kv_heads: int, window: int) -> None:
        self.part, self.kv_heads, self.window = part, kv_heads, window
        self.t0, self.t1 = part.c0 * window, min(part.c1 * window, tokens)
        self.rows = (part.b.stop - part.b.start) * (part.g.stop - part.g.start)
        self.chunks = part.c1 - part.c0

    def view(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """[heads / G, g, b, t1 - t0, ...] of [B, heads, T, ...]."""
        grouped = x[self.part.b].unflatten(1, (self.kv_heads, -1))[:, self.part.g]
        return grouped[:, :, :, t0:t1].movedim(0, 2).movedim(1, 0)

    def query_tile(self, x: Tensor, scratch: Scratch, name: str) -> Tensor:
        """[n, X, W, dim] of x [B, H, T, dim]: a view if x already has this layout and whole chunks."""
        plain = self.view(x, self.t0, self.t1)
        heads, batch, tokens = plain.shape[1:4]
        lies_well = x.dtype == scratch.dtype and x.stride(-1) == 1 and tokens == self.chunks * self.window
        if lies_well and batch == 1 and (heads == 1 or plain.stride(1) == tokens * plain.stride(3)):
            return plain[:, :, 0].unflatten(2, (self.chunks, self.window)).flatten(1, 2)
        return self.queries(x, scratch(name, plain.shape[0], self.rows * self.chunks, self.window, x.shape[-1]))

    def queries(self, x: Tensor, out: Tensor) -> Tensor:
        """Fill `out` [n, X, W, dim] (zeros after the last token)."""
        tokens = self.t1 - self.t0
        flat = self.flat(out)
        flat[:, :, :, :tokens].copy_(self.view(x, self.t0, self.t1))
        flat[:, :, :, tokens:] = 0.0
        return out

    def flat(self, tile: Tensor) -> Tensor:
        """[n, g, b, tokens, ...] of a query-side tile [n, X, W, ...]; a view."""
        return tile.view(tile.shape[0], *self._rows(), self.chunks * self.window, *tile.shape[3:])

    def keys(self, x: Tensor, out: Tensor) -> Tensor:
        """Fill `out` [m, 1 + X, W, dim]; slot 0 is the chunk before the tile, or zeros."""
        if self.part.c0:
            out[:, 0] = self.view(x, self.t0 - self.window, self.t0)[:, 0, 0]
        else:
            out[:, 0] = 0.0
        for j in range(out.shape[0]):
            flat = out[j, 1:].view(*self._rows(), self.chunks * self.window, out.shape[-1])
            flat[:, :, : self.t1 - self.t0].copy_(self.view(x, self.t0, self.t1)[j])
            flat[:, :, self.t1 - self.t0 :] = 0.0
        return out

    def unpack(self, tile: Tensor, x: Tensor) -> None:
        """Write a query-side tile [n, X, W, ...] to its place in x [B, heads, T, ...]."""
        flat = self.flat(tile)
        self.view(x, self.t0, self.t1).copy_(flat[:, :, :, : self.t1 - self.t0])

    def add_keys(self, tile: Tensor, x: Tensor) -> None:
        """Add a padded key-side tile [m, 1 + X, W, dim] to x [B, heads, T, dim]."""
        if self.part.c0:
            self.view(x, self.t0 - self.window, self.t0)[:, 0, 0].add_(tile[:, 0])
        for j in range(tile.shape[0]):
            flat = tile[j, 1:].view(*self._rows(), self.chunks * self.window, tile.shape[-1])
            self.view(x, self.t0, self.t1)[j].add_(flat[:, :, : self.t1 - self.t0])

    def per_row(self, x: Tensor) -> Tensor:
        """[heads / G, R, ...] of [B, heads, ...], rows in tile order."""
        return (
            x[self.part.b].unflatten(1, (self.kv_heads, -1))[:, self.part.g].movedim(0, 2).movedim(1, 0).flatten(1, 2)
        )

    def _rows(self) -> tuple[int, int]:
        return (self.part.g.stop - self.part.g.start, self.part.b.stop - self.part.b.start)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call; `log_ratio_H` is log(g / l), `first_B` the position of token 0 of each row."""

    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTE: Tensor
    fq_BHTF: Tensor | None
    fk_BKTF: Tensor | None
    log_ratio_H: Tensor
    sink_logit_H: Tensor | None
    sink_k_BGSD: Tensor | None
    sink_v_BGSE: Tensor | None
    first_B: Tensor | None
    start: tuple[Tensor, Tensor] | None
    """Far sums before token 0: [B, K, F, E] and [B, K, F]."""


class TileWork:
    """One tile: its packed inputs, and the intermediate results that forward and backward share.

    `key_maps` is the number of key maps if the inputs have no features (the caller then sets fq and fk).
    """

    def __init__(self, x: Inputs, rule: Rule, part: TilePart, scratch: Scratch, key_maps: int | None = None) -> None:
        batch, heads, tokens, dim = x.q_BHTD.shape
        kv_heads, values = x.k_BGTD.shape[1], x.v_BGTE.shape[-1]
        self.rule, self.part, self.x = rule, part, x
        self.groups = part.g.stop - part.g.start
        self.pack = Packer(part, tokens, kv_heads, rule.window)
        n, window = heads // kv_heads, rule.window
        if key_maps is None:
            key_maps = kv_heads if x.fk_BKTF is None else x.fk_BKTF.shape[1]
        m = key_maps // kv_heads
        self.tile = Tile(rule, n, m, self.pack.rows, self.pack.chunks, part.c0 == 0, scratch, self._far_from())
        total = self.tile.total
        self.v = self.pack.keys(x.v_BGTE, scratch("v", 1, 1 + total, window, values))[0]
        self.near = rule.kind != "linear"
        if self.near or x.fq_BHTF is None:
            self.q = self.pack.query_tile(x.q_BHTD, scratch, "q")
            self.k = self.pack.keys(x.k_BGTD, scratch("k", 1, 1 + total, window, dim))[0]
        if x.fq_BHTF is not None and x.fk_BKTF is not None:
            features = x.fq_BHTF.shape[-1]
            self.fq = self.pack.query_tile(x.fq_BHTF, scratch, "fq")
            self.fk = self.pack.keys(x.fk_BKTF, scratch("fk", m, 1 + total, window, features))
        ratio = x.log_ratio_H.exp().expand(batch, heads)
        self.ratio_nX = self.pack.per_row(ratio).repeat_interleave(self.tile.chunks, dim=1)

    def _far_from(self) -> Tensor | None:
        if not self.rule.sinks:
            return None
        assert self.x.first_B is not None
        token = torch.arange(
            self.part.c0 * self.rule.window, self.part.c1 * self.rule.window, device=self.x.first_B.device
        )
        start = self.rule.near_start(self.x.first_B[self.part.b, None] + token)
        rows = start.repeat(self.groups, 1)
        return rows.unflatten(1, (-1, self.rule.window))

    def near_softmax(self) -> None:
        """Sets p, scores, near_k, near_v."""
        x = self.x
        extra = [t for t in (x.sink_k_BGSD, x.sink_logit_H) if t is not None]
        extra_k = extra_v = sink_logit = None
        if extra:
            rows_k, rows_v = [], []
            if x.sink_k_BGSD is not None and x.sink_v_BGSE is not None:
                rows_k.append(self.pack.per_row(x.sink_k_BGSD)[0].to(self.k.dtype))
                rows_v.append(self.pack.per_row(x.sink_v_BGSE)[0].to(self.v.dtype))
            if x.sink_logit_H is not None:
                rows_k.append(self.k.new_zeros(self.tile.rows, 1, self.k.shape[-1]))
                rows_v.append(self.v.new_zeros(self.tile.rows, 1, self.v.shape[-1]))
                sink_logit = self.pack.per_row(x.sink_logit_H.to(self.k.dtype).expand(x.q_BHTD.shape[0], -1))
            extra_k, extra_v = torch.cat(rows_k, 1), torch.cat(rows_v, 1)
        self.near_k = self.tile.near_view(self.k, extra_k)
        self.near_v = self.tile.near_view(self.v, extra_v)
        self.p, self.scores = self.tile.near_weights(self.q, self.near_k, sink_logit)

    def add_per_head(self, grad_H: Tensor, value_nXW: Tensor, sign: float = 1.0) -> None:
        """Add `sign` times the sum over a tile's tokens and rows to the gradient of their heads."""
        by_head = value_nXW.reshape(self.tile.n, self.groups, -1).sum(-1)
        grad_H.view(-1, self.tile.n)[self.part.g].add_(by_head.mT, alpha=sign)

    def row_start(self, features: int) -> tuple[Tensor, Tensor]:
        """Sums at the start of the rows, ([m, R, L, F, E], [m, R, L, F]), from the incoming state, or zeros."""
        tile, lag = self.tile, self.tile.lag
        if self.x.start is None:
            s = self.v.new_zeros(1, 1, 1, features, self.v.shape[-1])
            shape = (tile.m, tile.rows, lag)
            return s.expand(*shape, -1, -1), s[..., 0].expand(*shape, -1)
        s, z = (self.pack.per_row(t).to(self.v.dtype) for t in self.x.start)
        return s[:, :, None].expand(-1, -1, lag, -1, -1), z[:, :, None].expand(-1, -1, lag, -1)
