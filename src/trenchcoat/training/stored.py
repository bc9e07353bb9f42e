"""The teacher's logits as bytes: of each token the ``TOP`` most likely next tokens, and all others as one.

A token takes 4 + 6 ``TOP`` bytes: the logarithm of the others' probability (float32), then log-probabilities (float16)
and tokens (int32), the most likely first. Reading scales the listed probabilities so that all sum to 1 exactly. The
divergence of these coarser distributions is at most that of the whole ones, and equal where the student spreads the
others' probability as the teacher does.

Shapes: b rows, T tokens, n tokens of a piece, d hidden size, V vocabulary, K listed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trenchcoat.runtime.head import VocabularyHead
from trenchcoat.training.logits import Taught, log_probabilities

TOP = 256
"""K: listed tokens of each position, where the vocabulary has more."""
TAUGHT = "taught"
"""Key of the stored logits in a batch, uint8 [b, T, bytes]."""


def listed(vocabulary: int) -> int:
    """K for a vocabulary: fewer than its tokens, so that there are others."""
    return min(TOP, vocabulary - 1)


def token_bytes(vocabulary: int) -> int:
    """Bytes of one token."""
    return 4 + 6 * listed(vocabulary)


def packed_logits(head: VocabularyHead, hidden_bTd: Tensor) -> Tensor:
    """The stored form of the logits of hidden states: uint8 [b, T, bytes], computed in pieces."""
    flat_nd = hidden_bTd.flatten(0, 1)
    with torch.no_grad():
        parts = [_packed(log_probabilities(head(flat_nd[where]))) for where in head.pieces(len(flat_nd))]
    return torch.cat(parts).view(*hidden_bTd.shape[:2], -1)


def _packed(log_p_nV: Tensor) -> Tensor:
    top = log_p_nV.topk(listed(log_p_nV.shape[1]), dim=-1)
    rest_n1 = log_p_nV.scatter_(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    columns = (rest_n1.float(), top.values.half(), top.indices.int())
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], -1)


def stored_teacher(model: nn.Module, batch: Mapping[str, Tensor]) -> Taught:
    """The teacher whose logits are in the batch."""
    return StoredLogits(batch[TAUGHT].flatten(0, 1))


@dataclass(frozen=True)
class StoredLogits:
    """Stored logits of a flattened batch, uint8 [b T, bytes]."""

    packed: Tensor

    def divergence(self, head: VocabularyHead, at_n: Tensor, student_nV: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~trenchcoat.training.logits.Taught`; the student's other tokens are taken as one too."""
        rest_n1, log_p_nK, tokens_nK = self._unpacked(at_n, student_nV.dtype)
        p_nK, rest_p_n1 = log_p_nK.exp(), rest_n1.exp()
        student_nK = student_nV.gather(1, tokens_nK)
        others_nV = student_nV.scatter(1, tokens_nK, -torch.inf)
        others_n1 = others_nV.logsumexp(-1, keepdim=True)
        tail_n = torch.where(rest_p_n1 > 0, rest_p_n1 * (rest_n1 - others_n1), 0.0)[:, 0]
        # the gradient pulls the listed tokens to p, and the others to the rest, shared as the student shares it
        pull_nV = others_nV.sub_(others_n1 - rest_n1).exp_().scatter_(1, tokens_nK, p_nK)
        return (p_nK * (log_p_nK - student_nK)).sum(-1) + tail_n, pull_nV

    def _unpacked(self, at_n: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the others [n, 1], of the listed tokens [n, K], and those tokens [n, K]."""
        packed = self.packed[at_n]
        count = (packed.shape[1] - 4) // 6
        parts = packed.split([4, 2 * count, 4 * count], dim=-1)
        rest, listed_p, tokens = (
            part.contiguous().view(kind)
            for part, kind in zip(parts, (torch.float32, torch.float16, torch.int32), strict=True)
        )
        rest_n1, log_p_nK = rest.to(dtype), listed_p.to(dtype)
        scale_n1 = torch.log1p(-rest_n1.exp()) - log_p_nK.logsumexp(-1, keepdim=True)
        return rest_n1, log_p_nK + scale_n1, tokens.long()
