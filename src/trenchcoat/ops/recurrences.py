"""Definitions of the far parts that forget or correct, token by token: slow and simple; every test compares with them.

Sources: gated sums, xLSTM (https://arxiv.org/abs/2405.04517, section 2.3); decayed sums, Lightning Attention-2
(https://arxiv.org/abs/2401.04658); the gated delta rule (https://arxiv.org/abs/2412.06464, equation 10); Kimi delta
attention (https://arxiv.org/abs/2510.26692, equation 1).

Shape legend: B rows, H query heads, K heads of the key map (H or a divisor), T tokens, D key dim, E value dim,
F features. Everything is computed in the inputs' dtype. A token where `real_BT` is False does not exist: it changes
nothing, and its output is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trenchcoat.ops.state import Rule


def gated_far(
    fq_BHTF: Tensor,
    fk_BKTF: Tensor,
    v_BKTE: Tensor,
    log_forget_BKT: Tensor,
    log_input_BKT: Tensor,
    real_BT: Tensor,
    rule: Rule,
) -> Tensor:
    """phi(q_n) S / phi(q_n) z [B, H, T, E], where S and z are sums over the far keys R(n) of `rule` alone:

        S = f_j S + i_j phi(k_j) v_j^T,   z = f_j z + i_j phi(k_j)      for each j that becomes far, in order

    The forget gates of keys that are still near would scale S and z alike, so they have no effect. The first
    `rule.sinks` tokens are never far. 0 where R(n) is empty.
    """
    heads, share = fq_BHTF.shape[1], fq_BHTF.shape[1] // fk_BKTF.shape[1]
    rows = []
    for b in range(len(real_BT)):
        s, z = fk_BKTF.new_zeros(fk_BKTF.shape[1], fk_BKTF.shape[3], v_BKTE.shape[3]), 0.0 * fk_BKTF[b, :, 0]
        outputs, times, folded = [], real_BT[b].nonzero()[:, 0].tolist(), 0
        for t in range(real_BT.shape[1]):
            if not real_BT[b, t]:
                outputs.append(v_BKTE.new_zeros(heads, v_BKTE.shape[3]))
                continue
            position = int(real_BT[b, : t + 1].sum()) - 1
            start = int(rule.near_start(torch.tensor(position)))
            for j in range(folded, start):
                at = times[j]
                forget, write = log_forget_BKT[b, :, at].exp(), log_input_BKT[b, :, at].exp()
                fk = fk_BKTF[b, :, at] * write[:, None] if j >= rule.sinks else torch.zeros_like(fk_BKTF[b, :, at])
                s = forget[:, None, None] * s + fk[:, :, None] * v_BKTE[b, :, at, None]
                z = forget[:, None] * z + fk
            folded = max(folded, start)
            fq = fq_BHTF[b, :, t]
            num = torch.einsum("hf,hfe->he", fq, s.repeat_interleave(share, 0))
            den = (fq * z.repeat_interleave(share, 0)).sum(-1, keepdim=True)
            outputs.append(num / den if start > rule.sinks else torch.zeros_like(num))
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows)


def gated_sums(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, log_forget_BHT: Tensor, real_BT: Tensor, start_BHDE: Tensor
) -> tuple[Tensor, Tensor]:
    """q_t S_t [B, H, T, E] and the last S, where S_t = f_t S_{t-1} + k_t v_t^T and S_0 = `start_BHDE`."""
    s, outputs = start_BHDE, []
    for t in range(q_BHTD.shape[2]):
        new = log_forget_BHT[:, :, t, None, None].exp() * s + k_BHTD[:, :, t, :, None] * v_BHTE[:, :, t, None]
        s, read = _where_real(real_BT[:, t], new, s, q_BHTD[:, :, t])
        outputs.append(read)
    return torch.stack(outputs, 2), s


def gated_delta(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTE: Tensor,
    log_forget_BHT: Tensor,
    beta_BHT: Tensor,
    real_BT: Tensor,
    start_BHDE: Tensor,
) -> tuple[Tensor, Tensor]:
    """q_t S_t / sqrt(D) [B, H, T, E] and the last S, where S_t = f_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    and S_0 = `start_BHDE`."""
    log_forget_BHTD = log_forget_BHT[..., None].expand(k_BHTD.shape)
    return kimi_delta(q_BHTD, k_BHTD, v_BHTE, log_forget_BHTD, beta_BHT, real_BT, start_BHDE)


def kimi_delta(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTE: Tensor,
    log_forget_BHTD: Tensor,
    beta_BHT: Tensor,
    real_BT: Tensor,
    start_BHDE: Tensor,
) -> tuple[Tensor, Tensor]:
    """As :func:`gated_delta` with one forget gate a key channel,

    S_t = (I - beta_t k_t k_t^T) diag(f_t) S_{t-1} + beta_t k_t v_t^T.
    """
    s, outputs = start_BHDE, []
    for t in range(q_BHTD.shape[2]):
        k, decayed = k_BHTD[:, :, t], log_forget_BHTD[:, :, t, :, None].exp() * s
        error = v_BHTE[:, :, t] - torch.einsum("bhd,bhde->bhe", k, decayed)
        new = decayed + (beta_BHT[:, :, t, None] * k)[..., None] * error[:, :, None]
        s, read = _where_real(real_BT[:, t], new, s, q_BHTD[:, :, t])
        outputs.append(read * q_BHTD.shape[3] ** -0.5)
    return torch.stack(outputs, 2), s


def _where_real(real_B: Tensor, new: Tensor, old: Tensor, q_BHD: Tensor) -> tuple[Tensor, Tensor]:
    """(the state of each row, what its query reads); nothing happens where there is no token."""
    s = torch.where(real_B[:, None, None, None], new, old)
    return s, torch.einsum("bhd,bhde->bhe", q_BHD, s) * real_B[:, None, None]
