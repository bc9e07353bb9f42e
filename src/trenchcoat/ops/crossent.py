"""Cross-entropy between the rows of the teacher's and the student's attention maps, in blocks of queries.

H(a_n, a_hat_n) = - sum_j a_nj log a_hat_nj. Quadratic in time, but only one [block, T] block of a head's map exists at
a time. A sink logit is one more column of both maps.

Shape legend: B rows, H query heads, G key/value heads, K key maps (G or H), T tokens, F features, Q queries of a block,
J keys they can see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trenchcoat.ops.state import LINEAR_EPS, Features, HeadWeights, Rule, Tokens

MAP_ELEMENTS = 1 << 19
"""Entries of one block of a map."""
SMALLEST = 1e-30
"""Lower clamp of far weights before the logarithm."""
NEEDS_FAR = "the cross-entropy needs the far part; without it the student gives most keys probability 0"


Gradients = tuple[Tensor, Tensor, Tensor]
"""For phi(q) [B, H, T, F], phi(k) [B, K, T, F] and log(g / l) [H]."""


@torch.no_grad()
def attention_cross_entropy(
    tokens: Tokens,
    features: Features,
    heads: HeadWeights,
    rule: Rule,
    *,
    length_B: Tensor | None = None,
    teacher_window: int | None = None,
    gradients: bool = True,
) -> tuple[Tensor, Gradients | None]:
    """Sum over rows, heads and tokens, and its gradients (None if not requested).

    For rows without padding between tokens (`length_B` tokens each, None: all T); the teacher is causal softmax, over
    the last `teacher_window` tokens if given. Needs `rule.far`: without it the student's map has zeros.
    """
    if not rule.far or features.k_BKTF is None:
        raise ValueError(NEEDS_FAR)
    q_BHTD, k_BGTD, fq_BHTF, fk_BKTF = tokens.q_BHTD, tokens.k_BGTD, features.q_BHTF, features.k_BKTF
    batch, heads_count, count, _ = q_BHTD.shape
    log_ratio_H = rule.log_ratio(heads.mix_H)
    sink_H = None if heads.sink_logit_H is None else heads.sink_logit_H.to(fq_BHTF.dtype)
    total = torch.zeros((), dtype=fq_BHTF.dtype, device=q_BHTD.device)
    dfq, dfk, dratio = (torch.zeros_like(x) for x in (fq_BHTF, fk_BKTF, log_ratio_H))
    lengths = [count] * batch if length_B is None else length_B.tolist()
    block = max(1, MAP_ELEMENTS // count)
    for b in range(batch):
        for h in range(heads_count):
            key_map = h * fk_BKTF.shape[1] // heads_count
            k = k_BGTD[b, h * k_BGTD.shape[1] // heads_count].to(fq_BHTF.dtype)
            sink = None if sink_H is None else sink_H[h]
            for t0 in range(0, lengths[b], block):
                t1 = min(t0 + block, lengths[b])
                fq, fk = fq_BHTF[b, h, t0:t1], fk_BKTF[b, key_map, :t1]
                scores = rule.scale * q_BHTD[b, h, t0:t1].to(fq.dtype) @ k[:t1].mT
                loss, dfar, dlog = _block(scores, fq @ fk.mT, log_ratio_H[h], sink, t0, rule, teacher_window)
                total += loss
                if gradients:
                    dfq[b, h, t0:t1] = dfar @ fk
                    dfk[b, key_map, :t1].addmm_(dfar.mT, fq)
                    dratio[h] += dlog
    return total, (dfq, dfk, dratio) if gradients else None


def _block(
    scores_QJ: Tensor,
    far_QJ: Tensor,
    log_ratio: Tensor,
    sink: Tensor | None,
    t0: int,
    rule: Rule,
    teacher_window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the queries' cross-entropies, gradient for the far products, gradient for log(g / l))."""
    if rule.softcap is not None:
        scores_QJ = rule.softcap * torch.tanh(scores_QJ / rule.softcap)
    key = torch.arange(scores_QJ.shape[1], device=scores_QJ.device)
    query = key[t0:, None]
    hidden = key > query
    if teacher_window is not None:
        hidden |= key <= query - teacher_window
    teacher = scores_QJ.masked_fill(hidden, float("-inf"))
    near, far = rule.is_near(query, key), rule.is_far(query, key)
    largest = scores_QJ.masked_fill(~near, torch.finfo(scores_QJ.dtype).min).amax(-1, keepdim=True)
    if sink is not None:
        teacher = torch.cat([teacher, sink.expand(len(teacher), 1)], -1)
        largest = largest.clamp_min(sink)
    teacher = teacher.softmax(-1)
    probability, none = teacher[:, : scores_QJ.shape[1]], torch.zeros((), dtype=far_QJ.dtype, device=far_QJ.device)
    log_near = (log_ratio + scores_QJ - largest).masked_fill(~near, float("-inf"))
    near_den = log_near.exp().sum(-1)
    near_share = (probability * near).sum(-1)
    cross = torch.where(near, probability * log_near, none).sum(-1)
    if sink is not None and rule.kind != "linear":
        log_sink = (log_ratio + sink - largest)[:, 0]
        near_den, near_share = near_den + log_sink.exp(), near_share + teacher[:, -1]
        cross = cross + teacher[:, -1] * log_sink
    weight = torch.where(far, far_QJ, none)
    den = near_den + weight.sum(-1) + (LINEAR_EPS if rule.kind == "linear" else 0.0)
    safe = far_QJ.clamp_min(SMALLEST)
    cross = cross + torch.where(far, probability * safe.log(), none).sum(-1)
    everything = probability.sum(-1) if rule.kind == "linear" else teacher.sum(-1)
    loss = (everything * den.log() - cross).sum()
    share = (everything / den)[:, None]
    dfar = torch.where(far, share - probability / safe * (far_QJ >= SMALLEST), none)
    return loss, dfar, (near_den * share[:, 0] - near_share).sum()
