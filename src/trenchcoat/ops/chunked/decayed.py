"""Sums that forget, in chunks of tokens: O(T) time and memory, in matrix products, with autograd.

:mod:`trenchcoat.ops.recurrences` defines what they compute. Within a chunk, a key's weight at the chunk's end is the
product of the forget gates after it, exp(G_end - G_j) with G the running sum of log f: at most 1, so nothing overflows.

Shape legend: B rows, H query heads, K heads of the key map (H or a divisor), L tokens without padding between them,
C chunks of W tokens, D key dim, E value dim, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk in :func:`gated_sums`."""


@dataclass(frozen=True)
class FarSums:
    """S [B, K, F, E] and z [B, K, F] after the keys that are far for a query, as of the last of them."""

    s: Tensor
    z: Tensor


@dataclass(frozen=True)
class GatedKeys:
    """Aligned keys: features (0 for a sink), values, and the logarithms of both gates."""

    fk_BKLF: Tensor
    v_BKLE: Tensor
    log_forget_BKL: Tensor
    log_input_BKL: Tensor

    def split(self, length: int) -> Iterator[GatedKeys]:
        """Parts of ``length`` keys (the backward of `split` is one copy, that of slices one of the whole for each)."""
        parts = (self.fk_BKLF, self.v_BKLE, self.log_forget_BKL, self.log_input_BKL)
        return map(GatedKeys, *(part.split(length, 2) for part in parts))


def after_chunk(before: FarSums, keys: GatedKeys) -> FarSums:
    """The sums after a chunk of keys."""
    running_BKL = keys.log_forget_BKL.cumsum(2)
    total_BK = running_BKL[..., -1]
    weight_BKL1 = (keys.log_input_BKL + total_BK[..., None] - running_BKL).exp()[..., None]
    fk_BKLF, kept_BK1 = keys.fk_BKLF * weight_BKL1, total_BK.exp()[..., None]
    s = before.s * kept_BK1[..., None] + fk_BKLF.mT @ keys.v_BKLE
    return FarSums(s, before.z * kept_BK1 + fk_BKLF.sum(2))


def read_far(fq_BHLF: Tensor, sums: FarSums) -> Tensor:
    """fq S / fq z [B, H, L, E]; 0 where nothing was summed."""
    batch, heads, length, features = fq_BHLF.shape
    fq = fq_BHLF.reshape(batch, sums.z.shape[1], -1, features)
    den = fq @ sums.z[..., None]
    return (fq @ sums.s / torch.where(den > 0, den, 1.0)).view(batch, heads, length, -1)


def gated_far(
    fq_BHLF: Tensor, keys: GatedKeys, window: int, start: FarSums, folded_B: Tensor | None
) -> tuple[Tensor, FarSums]:
    """(y [B, H, L, E], the sums after the first `folded_B` chunks of each row) of :func:`recurrences.gated_far`.

    The queries of chunk c read the sums after chunk c - 2, or `start` if there is no such chunk; None folds no chunk.
    """
    reading, newest, after, outputs = start, start, start, []
    folded = 0 if folded_B is None else int(folded_B.max())
    queries = fq_BHLF.split(window, 2)
    for c, (fq, part) in enumerate(zip(queries, keys.split(window), strict=True)):
        outputs.append(read_far(fq, reading))
        reading = newest  # the sums after chunk c - 1
        if c + 2 < len(queries) or c < folded:
            newest = after_chunk(newest, part)
            after = after if folded_B is None else _where(folded_B > c, newest, after)
    return torch.cat(outputs, 2), after


def _where(row_B: Tensor, new: FarSums, old: FarSums) -> FarSums:
    at = row_B[:, None, None]
    return FarSums(torch.where(at[..., None], new.s, old.s), torch.where(at, new.z, old.z))


def gated_sums(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLE: Tensor, log_forget_BHL: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`recurrences.gated_sums` of real tokens. (Log gate 0 and k = 0 at other tokens leave S as it is.)"""
    state, outputs = start_BHDE, []
    if q_BHLD.shape[2] == 1:
        state = state * log_forget_BHL.exp()[..., None] + k_BHLD.mT @ v_BHLE
        return q_BHLD @ state, state
    for q, k, v, log_forget in zip(*(x.split(CHUNK, 2) for x in (q_BHLD, k_BHLD, v_BHLE, log_forget_BHL)), strict=True):
        running_BHL = log_forget.cumsum(2)
        between = running_BHL[..., :, None] - running_BHL[..., None, :]
        later = torch.ones_like(between[0, 0], dtype=torch.bool).triu(1)
        weights = q @ k.mT * between.masked_fill(later, float("-inf")).exp()
        outputs.append(weights @ v + (q * running_BHL.exp()[..., None]) @ state)
        left_BHL1 = (running_BHL[..., -1:] - running_BHL).exp()[..., None]
        state = state * running_BHL[..., -1].exp()[..., None, None] + (k * left_BHL1).mT @ v
    return torch.cat(outputs, 2), state
