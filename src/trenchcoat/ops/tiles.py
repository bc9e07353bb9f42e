"""The arithmetic of one tile of heads and chunks that fits in cache; shared by the chunkwise implementations.

A row's tokens are cut into chunks of W. Near keys of a chunk are the chunk before and the chunk itself, read through an
overlapping strided view; older chunks enter through running sums of phi(k)^T v. Queries of the n heads that share a
key/value head lie in an outer axis, so keys and values are never repeated. The weight of the near part relative to the
far part is r = g / l, which is all that the formula depends on.

Shape legend: n query heads per key/value head, m key maps per key/value head (n or 1), X = M * C chunks of the M rows
of the tile (a row is one key/value head of one batch row) in order, W tokens of a chunk, J = 2W + extra near columns
(sinks, sink logit), D key dim, E value dim, F features, L chunks the running sums lag behind the query's chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trenchcoat.ops.state import LINEAR_EPS, Rule

NEG_INF = float("-inf")


class Scratch:
    """Uninitialised buffers by name, reused from tile to tile, carved out of one piece of memory.

    One piece, because many middle-sized ones make the C library give the pages back and fetch them again every time.
    Its size is what the last scratch of the same `purpose` came to need.
    """

    _needed: ClassVar[dict[tuple[str, torch.dtype], int]] = {}
    _spacing: ClassVar[int] = 80
    """Elements between two buffers, so that large powers of two do not fall onto the same cache lines."""

    def __init__(self, device: torch.device, dtype: torch.dtype, purpose: str = "") -> None:
        self.device, self.dtype, self._key = device, dtype, (purpose, dtype)
        self._piece = torch.empty(self._needed.get(self._key, 0), device=device, dtype=dtype)
        self._used = 0
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The buffer `name` as `shape`; what an earlier call of the same name gave is overwritten by its user."""
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
        """Remember what was needed."""
        self._needed[self._key] = self._used

    def constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, made once."""
        if name not in self._flat:
            self._flat[name] = make()
        return self._flat[name]


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
    """1 where column <= row: a sliding query's far keys in the chunk before, a linear query's in its own."""
    return torch.ones(window, window, device=device, dtype=dtype).tril_()


def bmm_shared(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """out[j] (+)= a[j] @ b[j] over a leading axis that `b` (or `a`, or `out`: then summed) may have only once."""
    count = max(a.shape[0], b.shape[0])
    for j in range(count):
        aj, bj, oj = a[j % a.shape[0]], b[j % b.shape[0]], out[j % out.shape[0]]
        if accumulate or (j > 0 and out.shape[0] == 1):
            oj.baddbmm_(aj, bj)
        else:
            torch.bmm(aj, bj, out=oj)
    return out


def accumulate_(x_mRC: Tensor, *, backwards: bool = False) -> None:
    """Running sums along axis 2, in place. (`cumsum` walks that axis with strides, which only short rows forgive.)"""
    if x_mRC.ndim == 4:
        sums = x_mRC.flip(2).cumsum(2).flip(2) if backwards else x_mRC.cumsum(2)
        x_mRC.copy_(sums)
        return
    chunks = x_mRC.unbind(2)
    for before, chunk in itertools.pairwise(reversed(chunks) if backwards else chunks):
        chunk.add_(before)


@dataclass
class Tile:
    """Sizes of a tile, and the near and far arithmetic on packed arrays.

    `first` says that chunk 0 of every row has no predecessor; otherwise the tile is a later piece of a single row and
    slot 0 of the padded key arrays holds its predecessor.
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
    """L; by default 2, and 1 for kind ``linear``. With 0 the caller has already paired query and key chunks."""

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
        """(softmax over the near columns [n, X, W, J], scores before it); the scores are overwritten by a next call.

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

        Entry i < X is what chunk i's queries see (chunks up to i - L and what came before the tile); in a tile of one
        row the last L entries are what the next tile starts from. `start` = ([m, R, L, F, E], [m, R, L, F]).
        """
        features, dim = fk_mxWF.shape[-1], v_xWE.shape[-1]
        s = self.scratch("prefix_s", self.m, self.lag + self.total, features, dim)
        z = self.scratch("prefix_z", self.m, self.lag + self.total, features)
        for j in range(self.m):
            torch.bmm(fk_mxWF[j, 1:].mT, v_xWE[1:], out=s[j, self.lag :])
            torch.sum(fk_mxWF[j, 1:], 1, out=z[j, self.lag :])
        for x, begin in ((s, start[0]), (z, start[1])):
            rows = x[:, : self.total].unflatten(1, (self.rows, self.chunks))
            head = min(self.lag, self.chunks)
            rows[:, :, :head] = begin[:, :, :head]
            accumulate_(rows[:, :, max(1, self.lag) - 1 :])
            if self.rows == 1 and self.lag:
                x[:, self.chunks : self.lag] = begin[:, 0, self.chunks :]
                for i in range(max(self.chunks, self.lag), self.chunks + self.lag):
                    x[:, i].add_(x[:, i - 1])
        return s, z

    def suffix_sums(
        self, fq_nXWF: Tensor, dnum_nXWE: Tensor, dden_nXW: Tensor, after: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the running sums, summed over the chunks that see them: [m, X + L, F, E] and [m, X + L, F].

        Entry i + L is the gradient of chunk i's own sums. `after` = ([m, L, F, E], [m, L, F]), the first L entries of
        the tile that follows in the same row; afterwards entries 0..L-1 are what the preceding tile needs.
        """
        features, dim = fq_nXWF.shape[-1], dnum_nXWE.shape[-1]
        s = self.scratch("suffix_s", self.m, self.total + self.lag, features, dim)
        z = self.scratch("suffix_z", self.m, self.total + self.lag, features)
        bmm_shared(fq_nXWF.mT, dnum_nXWE, s[:, : self.total])
        weighted = torch.mul(fq_nXWF, dden_nXW[..., None], out=self.scratch("weighted", *fq_nXWF.shape))
        if self.m == self.n:
            torch.sum(weighted, 2, out=z[:, : self.total])
        else:
            torch.sum(weighted, (0, 2), out=z[0, : self.total])
        for x, tail in ((s, None if after is None else after[0]), (z, None if after is None else after[1])):
            rows = x[:, : self.total].unflatten(1, (self.rows, self.chunks))
            if tail is None:
                x[:, self.total :] = 0.0
            else:
                x[:, self.total :] = tail
                x[:, self.total - 1].add_(x[:, self.total])
            accumulate_(rows, backwards=True)
            if self.rows > 1:
                rows[:, :, : self.lag] = 0.0
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
        """The denominator over l, [n, X, W], and y in place of `num` [n, X, W, E].

        `near` = (softmax p, its near values [X, J, E]).
        """
        s, z = prefix[0][:, : self.total], prefix[1][:, : self.total]
        den = torch.sum(
            torch.mul(fq_nXWF, z[:, :, None], out=self.scratch("weighted", *fq_nXWF.shape)),
            -1,
            out=self.scratch("den", self.n, self.total, self.window),
        )
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

        `buffers` names the scratch the first two are written to.
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
