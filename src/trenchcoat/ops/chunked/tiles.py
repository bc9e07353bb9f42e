"""The arithmetic of one tile of heads and chunks that fits in cache; shared by the chunkwise implementations.

A row's tokens are split into chunks of W. Near keys of a chunk are the chunk before and the chunk itself, read through
an overlapping strided view; older chunks enter through running sums of phi(k)^T v. Queries of the n heads that share a
key/value head have an outer axis, so keys and values are never repeated. The weight of the near part relative to the
far part is r = g / l; the formula depends on g and l only through r.

Shape legend: n query heads per key/value head, m key maps per key/value head (n or 1), X = M * C chunks of the M rows
of the tile (a row is one key/value head of one batch row) in order, W tokens of a chunk, J = 2W + extra near columns
(sinks, sink logit), D key dim, E value dim, F features, L chunks the running sums lag behind the query's chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from trenchcoat.ops.state import LINEAR_EPS, Rule

NEG_INF = float("-inf")


class Scratch:
    """Uninitialised buffers by name, reused from tile to tile, allocated from one block of memory.

    One block, because with many medium-sized ones malloc returns pages to the system and requests them again every
    time. Its size is what the last scratch of the same `purpose` needed.
    """

    _needed: ClassVar[dict[tuple[str, torch.dtype], int]] = {}
    _spacing: ClassVar[int] = 80
    """Elements between two buffers, so that buffers of large power-of-two sizes do not share cache sets."""

    def __init__(self, device: torch.device, dtype: torch.dtype, purpose: str = "") -> None:
        self.device, self.dtype, self._key = device, dtype, (purpose, dtype)
        self._piece = torch.empty(self._needed.get(self._key, 0), device=device, dtype=dtype)
        self._used = 0
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The buffer `name` as `shape`; it shares memory with the result of any earlier call with the same name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._carve(size)
        return flat[:size].view(shape)

    def _carve(self, size: int) -> Tensor:
        start, self._used = self._used, self._used + -(-size // 16) * 16 + self._spacing
        if self._used <= self._piece.numel():
            return self._piece[start : start + size]
        return torch.empty(size, device=self.device, dtype=self.dtype)

    def close(self) -> None:
        """Record the size needed."""
        self._needed[self._key] = self._used

    def constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The result of `make`, called once."""
        if name not in self._flat:
            self._flat[name] = make()
        return self._flat[name]


_T = TypeVar("_T")
_R = TypeVar("_R")


@torch.no_grad()
def run_tiles(
    tasks: Iterable[_T], work: Callable[[_T, Scratch], _R], *, device: torch.device, dtype: torch.dtype, purpose: str
) -> list[_R]:
    """Run `work(task, scratch)` for every task with one scratch of this `purpose`, without autograd.

    Tiles run one at a time; threads parallelise their operations. (One tile per thread was slower at every size
    measured on two cores: every operation takes the GIL, and each tile needs its own scratch.)
    """
    scratch = Scratch(device, dtype, purpose)
    results = [work(task, scratch) for task in tasks]
    scratch.close()
    return results


def _near_bias(kind: str, window: int, extra: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where the key in column j of [previous chunk | own chunk | extra] is near for the query in row i, else -inf."""
    row = torch.arange(window, device=device)[:, None]
    column = torch.arange(2 * window, device=device)
    near = column <= row + window
    if kind == "sliding":
        near = near & (column > row)
    bias = torch.zeros(window, 2 * window + extra, device=device, dtype=dtype)
    bias[:, : 2 * window].masked_fill_(~near, NEG_INF)
    return bias


def _local_mask(window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 where column <= row: a sliding query's far keys in the previous chunk, a linear query's in its own."""
    return torch.ones(window, window, device=device, dtype=dtype).tril_()


def bmm_shared(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """out[j] (+)= a[j] @ b[j] over a leading axis, which may have size 1 in `b` (or `a`, or `out`: then summed)."""
    count = max(a.shape[0], b.shape[0])
    for j in range(count):
        aj, bj, oj = a[j % a.shape[0]], b[j % b.shape[0]], out[j % out.shape[0]]
        if accumulate or (j > 0 and out.shape[0] == 1):
            oj.baddbmm_(aj, bj)
        else:
            torch.bmm(aj, bj, out=oj)
    return out


SCAN = 32
"""Chunks summed by one triangular matrix product; at D = 64, F = 128 this is 4 % of a tile's arithmetic."""


def running_sums(
    own_RCN: Tensor, out_RCN: Tensor, carry_RN: Tensor | None, triangle_SS: Tensor, *, backwards: bool = False
) -> None:
    """out[c] = carry + the sum of own[c'] over c' <= c (backwards: c' >= c), in products of SCAN chunks at a time.

    A loop of additions is as cheap in arithmetic, but needs one call per chunk.
    """
    rows, chunks = own_RCN.shape[:2]
    starts = range(0, chunks, SCAN)
    for start in reversed(starts) if backwards else starts:
        block = slice(start, min(start + SCAN, chunks))
        size = block.stop - block.start
        triangle = triangle_SS[:size, :size]
        triangle_RSS = (triangle.mT if backwards else triangle).expand(rows, size, size)
        torch.bmm(triangle_RSS, own_RCN[:, block], out=out_RCN[:, block])
        if carry_RN is not None:
            out_RCN[:, block].add_(carry_RN[:, None])
        carry_RN = out_RCN[:, block.start if backwards else block.stop - 1]


@dataclass
class Tile:
    """Sizes of a tile, and the near and far arithmetic on packed arrays.

    `first`: chunk 0 of every row has no predecessor; otherwise the tile is a later part of a single row and slot 0 of
    the padded key arrays holds its predecessor.
    """

    rule: Rule
    n: int
    m: int
    rows: int
    chunks: int
    first: bool
    scratch: Scratch
    sink_far_from: Tensor | None = None
    """With sinks: position of the first near key (sinks apart) for each query, int64 [rows, chunks, W]."""
    lag: int = -1
    """L; by default 2, or 1 for kind ``linear``. With 0 the caller has already paired query and key chunks."""

    def __post_init__(self) -> None:
        if self.lag < 0:
            self.lag = 1 if self.rule.kind == "linear" else 2

    @property
    def window(self) -> int:
        """W."""
        return self.rule.window

    @property
    def total(self) -> int:
        """X."""
        return self.rows * self.chunks

    def near_view(self, padded_xWD: Tensor, extra_rows: Tensor | None) -> Tensor:
        """[1 + X, W, D] -> [X, 2W (+ extra), D]; a view unless there are `extra_rows` [rows, extra, D]."""
        window, dim = padded_xWD.shape[1:]
        view = padded_xWD.as_strided((self.total, 2 * window, dim), (window * dim, dim, 1))
        if extra_rows is None:
            return view
        extra = extra_rows.repeat_interleave(self.chunks, dim=0)
        return torch.cat([view, extra], 1)

    def near_weights(self, q_nXWD: Tensor, near_k_XJD: Tensor, sink_logit_nR: Tensor | None) -> tuple[Tensor, Tensor]:
        """(softmax over the near columns [n, X, W, J], scores before it); the next call overwrites the scores.

        The sum of exp(s - c) is 1 / max of a softmax row.
        """
        rule, columns = self.rule, near_k_XJD.shape[1]
        scores = self.scratch("scores", self.n, self.total, self.window, columns)
        extra = columns - 2 * self.window
        bias = self.scratch.constant(
            "bias", lambda: _near_bias(rule.kind, self.window, extra, scores.device, scores.dtype)
        )
        for j in range(self.n):
            if rule.softcap is None:
                torch.baddbmm(bias, q_nXWD[j], near_k_XJD.mT, alpha=rule.scale, out=scores[j])
            else:
                torch.bmm(q_nXWD[j], near_k_XJD.mT, out=scores[j])
        if rule.softcap is not None:
            scores.mul_(rule.scale / rule.softcap).tanh_().mul_(rule.softcap).add_(bias)
        by_row = scores.view(self.n, self.rows, self.chunks, self.window, columns)
        if self.first:
            by_row[:, :, 0, :, : self.window] = NEG_INF
        if rule.sinks:
            assert self.sink_far_from is not None
            sink = torch.arange(rule.sinks, device=scores.device)
            hidden = sink >= self.sink_far_from[..., None]
            by_row[..., 2 * self.window : 2 * self.window + rule.sinks].masked_fill_(hidden, NEG_INF)
        if sink_logit_nR is not None:
            by_row[..., -1] = sink_logit_nR[:, :, None, None]
        p = torch.softmax(scores, -1, out=self.scratch("p", *scores.shape))
        return p, scores

    def prefix_sums(self, fk_mxWF: Tensor, v_xWE: Tensor, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Running sums of phi(k)^T v and phi(k), [m, L + X, F, E] and [m, L + X, F].

        Entry i < X is what chunk i's queries see (chunks up to i - L and everything before the tile); in a tile of one
        row, the next tile starts from the last L entries. `start` = ([m, R, L, F, E], [m, R, L, F]).
        """
        features, dim = fk_mxWF.shape[-1], v_xWE.shape[-1]
        s = self.scratch("prefix_s", self.m, self.lag + self.total, features, dim)
        z = self.scratch("prefix_z", self.m, self.lag + self.total, features)
        own_s, own_z = self._own_sums(features, dim)
        count = self.chunks if self.rows == 1 else max(0, self.chunks - self.lag)
        head = self.lag if self.rows == 1 else min(self.lag, self.chunks)
        for j in range(self.m):
            torch.bmm(fk_mxWF[j, 1:].mT, v_xWE[1:], out=own_s)
            torch.sum(fk_mxWF[j, 1:], 1, out=own_z)
            for own, x, begin in ((own_s, s[j], start[0][j]), (own_z, z[j], start[1][j])):
                own_RCN, x_RCN = self._by_row(own), self._by_row(x if self.rows == 1 else x[: self.total])
                begin_RLN = begin.reshape(*begin.shape[:2], -1)
                x_RCN[:, :head] = begin_RLN[:, :head]
                carry = begin_RLN[:, -1] if self.lag else None
                running_sums(own_RCN[:, :count], x_RCN[:, self.lag : self.lag + count], carry, self._triangle())
        return s, z

    def _own_sums(self, features: int, dim: int) -> tuple[Tensor, Tensor]:
        """Buffers for every chunk's own sums of one key map, [X, F, E] and [X, F]."""
        return self.scratch("own_s", self.total, features, dim), self.scratch("own_z", self.total, features)

    def _by_row(self, x: Tensor) -> Tensor:
        """[R * C, ...] -> [R, C, N]; a view."""
        return x.view(self.rows, x.shape[0] // self.rows, -1)

    def _triangle(self) -> Tensor:
        like = self.scratch
        return like.constant("triangle", lambda: torch.ones(SCAN, SCAN, device=like.device, dtype=like.dtype).tril_())

    def suffix_sums(
        self, fq_nXWF: Tensor, dnum_nXWE: Tensor, dden_nXW: Tensor, after: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the running sums, summed over the chunks that see them: [m, X + L, F, E] and [m, X + L, F].

        Entry i + L is the gradient of chunk i's own sums. `after` = ([m, L, F, E], [m, L, F]), the first L entries of
        the next tile in the same row; the returned entries 0..L-1 are passed to the previous tile.
        """
        features, dim = fq_nXWF.shape[-1], dnum_nXWE.shape[-1]
        s = self.scratch("suffix_s", self.m, self.total + self.lag, features, dim)
        z = self.scratch("suffix_z", self.m, self.total + self.lag, features)
        own_s, own_z = self._own_sums(features, dim)
        for j in range(self.m):
            mine = slice(j, j + 1) if self.m == self.n else slice(None)
            bmm_shared(fq_nXWF[mine].mT, dnum_nXWE[mine], own_s[None])
            bmm_shared(dden_nXW[mine, :, None], fq_nXWF[mine], own_z[None, :, None])
            for own, x, tail in ((own_s, s[j], after and after[0][j]), (own_z, z[j], after and after[1][j])):
                x[self.total :] = 0.0 if tail is None else tail
                carry = None if tail is None else tail.reshape(1, self.lag, -1)[:, 0]
                x_RCN = self._by_row(x[: self.total])
                running_sums(self._by_row(own), x_RCN, carry, self._triangle(), backwards=True)
                if self.rows > 1:
                    x_RCN[:, : self.lag] = 0.0
        return s, z

    def local_pairs(self, keys: Tensor) -> Tensor:
        """The chunk whose keys are partly far for chunk i's queries: before it (sliding) or itself (linear)."""
        return keys[:, :-1] if self.rule.kind == "sliding" else keys[:, 1:]

    def local_weights(self, fq_nXWF: Tensor, fk_mxWF: Tensor) -> Tensor:
        """phi(q) . phi(k) with the far keys of :meth:`local_pairs`, 0 for the others: [n, X, W, W]."""
        out = self.scratch("local", self.n, self.total, self.window, self.window)
        bmm_shared(fq_nXWF, self.local_pairs(fk_mxWF).mT, out)
        return self.mask_local_(out)

    def mask_local_(self, local_nXWW: Tensor) -> Tensor:
        """Zero what is not far, in place."""
        local_nXWW.mul_(
            self.scratch.constant("tril", lambda: _local_mask(self.window, local_nXWW.device, local_nXWW.dtype))
        )
        if self.first and self.rule.kind == "sliding":
            local_nXWW.view(self.n, self.rows, self.chunks, self.window, self.window)[:, :, 0] = 0.0
        return local_nXWW

    def combine(
        self,
        near: tuple[Tensor, Tensor] | None,
        fq_nXWF: Tensor,
        fk_mxWF: Tensor,
        v_xWE: Tensor,
        prefix: tuple[Tensor, Tensor],
        ratio_nX: Tensor,
        num: Tensor,
    ) -> Tensor:
        """Returns the denominator over l, [n, X, W]; replaces `num` [n, X, W, E] by y in place.

        `near` = (softmax p, its near values [X, J, E]).
        """
        s, z = prefix[0][:, : self.total], prefix[1][:, : self.total]
        den = self.scratch("den", self.n, self.total, self.window)
        bmm_shared(fq_nXWF, z[..., None], den[..., None])
        if near is None:
            den.add_(LINEAR_EPS)
            bmm_shared(fq_nXWF, s, num)
        else:
            p, near_v = near
            weight = self.near_scale(p, ratio_nX)
            den.add_(weight)
            bmm_shared(p, near_v[None], num)
            num.mul_(weight[..., None])
            bmm_shared(fq_nXWF, s, num, accumulate=True)
        if self.rule.kind != "terrace":
            local = self.local_weights(fq_nXWF, fk_mxWF)
            bmm_shared(local, self.local_pairs(v_xWE[None]), num, accumulate=True)
            den.add_(local.sum(-1))
        num.div_(den[..., None])
        return den

    def near_scale(self, p_nXWJ: Tensor, ratio_nX: Tensor) -> Tensor:
        """r * sum of exp(s - c), [n, X, W]; r * exp(s - c) is this times p."""
        top = torch.amax(p_nXWJ, -1, out=self.scratch("top", *p_nXWJ.shape[:-1]))
        return torch.div(ratio_nX[..., None], top, out=self.scratch("near_scale", *top.shape))

    def feature_gradients(
        self,
        fq_nXWF: Tensor,
        fk_mxWF: Tensor,
        v_xWE: Tensor,
        prefix: tuple[Tensor, Tensor],
        dnum_nXWE: Tensor,
        dden_nXW: Tensor,
        after: tuple[Tensor, Tensor] | None,
        buffers: tuple[str, str] = ("dfq", "dfk"),
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(dfq [n, X, W, F], dfk [m, 1 + X, W, F] over padded chunks, suffix sums).

        `buffers` are the names of the scratch buffers for the first two.
        """
        s, z = prefix[0][:, : self.total], prefix[1][:, : self.total]
        dfq = bmm_shared(dnum_nXWE, s.mT, self.scratch(buffers[0], *fq_nXWF.shape))
        dfq.addcmul_(dden_nXW[..., None], z[:, :, None])
        suffix = self.suffix_sums(fq_nXWF, dnum_nXWE, dden_nXW, after)
        dfk = self.scratch(buffers[1], *fk_mxWF.shape)
        dfk[:, 0] = 0.0
        bmm_shared(v_xWE[None, 1:], suffix[0][:, self.lag :].mT, dfk[:, 1:])
        dfk[:, 1:].add_(suffix[1][:, self.lag :, None])
        if self.rule.kind != "terrace":
            dlocal = self.scratch("dlocal", self.n, self.total, self.window, self.window)
            bmm_shared(dnum_nXWE, self.local_pairs(v_xWE[None]).mT, dlocal)
            self.mask_local_(dlocal.add_(dden_nXW[..., None]))
            bmm_shared(dlocal, self.local_pairs(fk_mxWF), dfq, accumulate=True)
            bmm_shared(dlocal.mT, fq_nXWF, self.local_pairs(dfk), accumulate=True)
        return dfq, dfk, suffix
