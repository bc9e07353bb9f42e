"""The operator as any 16-bit implementation has to compute it: a simple float64 run with rounded matrix products.

Written from the formula, one query at a time, with the far keys in a sum S; it shares no code with the kernels. It
rounds what tensor cores need rounded, the operands of every product, forward and backward (x W, q k^T, p v, phi(k)^T v,
phi(q) S; in the backward du, ds, dnum, dS), and what has to be stored: y, also for the dden computed from it, and the
gradients of q, k and v. Sums are exact, and so is everything between the products.

Shape legend: B rows, H query heads, T tokens, D key dim, E value dim, P columns of a map, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trenchcoat.ops import Rule

WIDE = torch.bfloat16
"""The dtype sums, features and gradients are rounded to: float16 overflows at 65504."""

DRAWS = 24
"""Random calls of the independent run."""
FACTOR = 2
"""Tolerance over the independent run's largest error. An implementation may round two numbers where the run rounds one
(S of a group and scores of a chunk instead of S alone) or round elsewhere, which gives sqrt(2) times an error of the
same size; and the largest error of a draw may be sqrt(2) above the largest of :data:`DRAWS` draws. Measured: of 1,392
errors of the kernels (24 draws of each kind, dtype and tensor), half are below 0.6 times the independent run's largest
error, one in a hundred is above 1.5 times, and the largest is 2.0 times."""


def tolerances(runs: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[str, float]:
    """Tolerance of each tensor, from pairs (independent run, exact) of random calls of the same sizes.

    Absolute: sums of cancelling terms (gradients of the mix) are sometimes small while their errors are not.
    """
    names = runs[0][1]
    return {n: FACTOR * max(float((found[n] - exact[n]).abs().max()) for found, exact in runs) for n in names}


def near(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype`."""
    return x.to(dtype).to(x.dtype)


class Product(torch.autograd.Function):
    """a @ b with both operands rounded to `dtype`, and both of each product of the backward to :data:`WIDE`.

    `parts` 2: b is taken as the sum of two numbers of `dtype`, forward only.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype, parts: int = 1) -> Tensor:
        ctx.save_for_backward(a, b)
        rounded = near(b, dtype)
        if parts == 2:
            rounded = rounded + near(b - rounded, dtype)
        return near(a, dtype) @ rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        dy = near(dy, WIDE)
        return dy @ near(b, WIDE).mT, near(a, WIDE).mT @ dy, None, None


class Quotient(torch.autograd.Function):
    """(num + far_num) / (den + far_den) of numerators [..., E] and denominators [..., 1] of the two parts.

    `shift` [..., 1] is c - log r, on which the near part depends only through exp(-shift): its gradient is taken from
    the far part, as y does not change when numerator and denominator are scaled alike. (A single-pass run has to do so;
    otherwise it would need all of a query's scores at once.) The backward uses y as it was stored, in `dtype` (None:
    exactly).
    """

    @staticmethod
    def forward(
        ctx: Any, shift: Tensor, num: Tensor, den: Tensor, far_num: Tensor, far_den: Tensor, dtype: torch.dtype | None
    ) -> Tensor:
        y = (num + far_num) / (den + far_den)
        ctx.save_for_backward(den + far_den, far_num, far_den, y if dtype is None else near(y, dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        den, far_num, far_den, y = ctx.saved_tensors
        dnum = dy / den
        dden = -(dnum * y).sum(-1, keepdim=True)
        dshift = (near(dnum, WIDE) * far_num).sum(-1, keepdim=True) + dden * far_den
        return dshift, dnum, dden, dnum, dden, None


class Stored(torch.autograd.Function):
    """x rounded to `dtype`, and its gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return near(x, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return near(dx, ctx.dtype), None


def features(x: Tensor, matrix: Tensor, bias: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """phi(x) [B, H, T, F], not rounded; matrix [H, D, P], bias [H, P]."""
    u = Product.apply(x, matrix[None].expand(x.shape[0], -1, -1, -1), dtype, 2)
    u = u if bias is None else u + bias[None, :, None]
    act, paired = {
        "hedgehog": (lambda u: u.softmax(-1), True),
        "hedgehog_half": (lambda u: u.softmax(-1), False),
        "exp": (lambda u: (u - u.amax(-1, keepdim=True)).exp(), True),
        "t2r": (torch.relu, False),
        "elu": (lambda u: 1 + torch.nn.functional.elu(u), False),
    }[name]
    return torch.cat([act(u), act(-u)], -1).clamp_min(1e-12) if paired else act(u).clamp_min(1e-12)


def straight(x: Tensor) -> Tensor:
    """x as rounded in products, with a straight-through gradient."""
    return x + (near(x, WIDE) - x).detach()


@dataclass(frozen=True, kw_only=True)
class LowPrecision:
    """A run with tensors and products of `dtype`; rows without padding."""

    rule: Rule
    map: str
    dtype: torch.dtype
    store: bool = True
    """y is rounded to `dtype` (transfer keeps no y)."""

    def __call__(self, leaves: dict[str, Tensor], *, bias: bool = False, sink_logit: bool = False) -> Tensor:
        """y [B, H, T, E] in float64 from float64 `leaves`, named as in :class:`kernel_kit.KernelCase`."""
        q, k, v = (Stored.apply(leaves[name], self.dtype) for name in "qkv")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        nothing = torch.zeros_like(q[..., :1])
        shift, num, den = nothing, nothing * v[..., :1, :], nothing + 1e-12
        far_num, far_den = num, nothing
        if self.rule.kind != "linear":
            shift, num, den = self._near(q, k, v, leaves["mix"], leaves["sink_logit"] if sink_logit else None)
        if self.rule.far:
            far_num, far_den = self._far(*self._features(q, k, leaves, bias), v)
        y = Quotient.apply(shift, num, den, far_num, far_den, self.dtype if self.store else None)
        return Stored.apply(y, self.dtype) if self.store else y

    def cross_entropy(self, leaves: dict[str, Tensor], log_ratio_H: Tensor) -> Tensor:
        """Sum of the cross-entropies of attention rows, as in :mod:`trenchcoat.ops.crossent`; gradients for phi from
        the logarithms of far weights are products, those from denominators are running sums."""
        q, k = (leaves[name].detach() for name in "qk")
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        position = torch.arange(q.shape[2], device=q.device)
        key, query = position[None], position[:, None]
        near, far = self.rule.is_near(query, key), self.rule.is_far(query, key)
        s = q @ k.mT * self.rule.scale
        teacher = s.masked_fill(key > query, -torch.inf).softmax(-1)
        top = s.masked_fill(~near, torch.finfo(s.dtype).min).amax(-1, keepdim=True)
        log_near = torch.where(near, s - top + log_ratio_H[None, :, None, None], 0.0)
        fq, fk = self._features(q, k, leaves, bias=False)
        log_far = torch.where(far, Product.apply(fq, fk.mT, WIDE), 1.0).log()
        den = torch.where(near, log_near.exp(), torch.where(far, straight(fq) @ straight(fk).mT, 0.0)).sum(-1)
        return den.log().sum() - (teacher * (log_near + log_far)).sum()

    def _features(self, q: Tensor, k: Tensor, leaves: dict[str, Tensor], bias: bool) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k), both by query head."""
        found = []
        for x, side in ((q, "query"), (k, "key")):
            matrix, offset = (
                leaves[f"{side}_{name}"].repeat_interleave(q.shape[1] // len(leaves[f"{side}_{name}"]), 0)
                for name in ("matrix", "bias")
            )
            found.append(features(x, matrix, offset if bias else None, self.map, self.dtype))
        return found[0], found[1]

    def _near(
        self, q: Tensor, k: Tensor, v: Tensor, mix: Tensor, logit: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(c - log r, numerator, denominator), the latter two as functions of the scores alone."""
        s = Product.apply(q, k.mT, self.dtype) * self.rule.scale
        if self.rule.softcap is not None:
            s = self.rule.softcap * torch.tanh(s / self.rule.softcap)
        position = torch.arange(q.shape[2], device=q.device)
        s = s.masked_fill(~self.rule.is_near(position[:, None], position[None]), -torch.inf)
        top = s.amax(-1, keepdim=True)
        extra = torch.zeros_like(top)
        if logit is not None:
            top = torch.maximum(top, logit[None, :, None, None])
            extra = (logit[None, :, None, None] - top.detach()).exp()
        log_ratio = self.rule.log_ratio(mix)[None, :, None, None]
        p, ratio = (s - top.detach()).exp(), log_ratio.detach().exp()
        return top - log_ratio, ratio * Product.apply(p, v, self.dtype), ratio * (p.sum(-1, keepdim=True) + extra)

    def _far(self, fq: Tensor, fk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One query at a time (with terraces, one chunk at a time) against S and z."""
        position = torch.arange(fq.shape[2], device=fq.device)
        far = self.rule.is_far(position[:, None], position[None])
        s, z = fk[..., :1, :].mT * v[..., :1, :] * 0.0, fk[..., :1, :].mT * 0.0
        nums, dens, n = [], [], 0
        while n < len(position):
            stop = n + 1
            while stop < len(position) and torch.equal(far[stop], far[n]):
                stop += 1
            new = far[n] & ~far[n - 1] if n else far[n]
            if bool(new.any()):
                f = fk[:, :, new]
                s = s + Product.apply(f.mT, v[:, :, new], WIDE)
                z = z + straight(f).sum(2, keepdim=True).mT
            nums.append(Product.apply(fq[:, :, n:stop], s, WIDE))
            dens.append(straight(fq[:, :, n:stop]) @ z)
            n = stop
        return torch.cat(nums, 2), torch.cat(dens, 2)
