"""Generation: one token after the other against a state of constant size, updated in place.

Rows may stand at different positions. Features are computed for the new tokens (by the caller) and, once in its life,
for every key that leaves the buffer.

Shape legend: B rows, H query heads = G * n, G key/value heads, K key maps (G or H), T new tokens, N buffer slots,
D key dim, E value dim, F features, S sinks, A rows that fold now, Q keys they fold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trenchcoat.ops.state import LINEAR_EPS, PhiK, Rule, StudentState


@torch.no_grad()
def decode(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    fq_BHTF: Tensor | None,
    fk_BKTF: Tensor | None,
    log_ratio_H: Tensor,
    state: StudentState,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    mask_BT: Tensor | None = None,
    phi_k: PhiK | None = None,
) -> Tensor:
    """y [B, H, T, E] in q's dtype; a token with mask False changes nothing and gets 0."""
    batch, heads, tokens, _ = q_BHTD.shape
    y = q_BHTD.new_zeros(batch, heads, tokens, v_BGTE.shape[-1])
    everyone = torch.arange(batch, device=state.seen_B.device)
    for t in range(tokens):
        rows = everyone if mask_BT is None else mask_BT[:, t].to(everyone.device).nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        whole = rows.numel() == batch
        fq = None if fq_BHTF is None else fq_BHTF[:, :, t] if whole else fq_BHTF[rows, :, t]
        fk = None if fk_BKTF is None else fk_BKTF[:, :, t] if whole else fk_BKTF[rows, :, t]
        q, k, v = ((x[:, :, t] if whole else x[rows, :, t]) for x in (q_BHTD, k_BGTD, v_BGTE))
        if rule.kind == "linear":
            _absorb(v, fk, state, rows, rule)
        else:
            _fold(state, rows, rule, phi_k)
            _store(k, v, state, rows, rule)
        out = _read(q, fq, log_ratio_H, state, rows, rule, sink_logit_H).to(y.dtype)
        if whole:
            y[:, :, t] = out
        else:
            y[rows, :, t] = out
    return y


def _absorb(v_BGE: Tensor, fk_BKF: Tensor | None, state: StudentState, rows: Tensor, rule: Rule) -> None:
    """Kind ``linear``: the token joins the far sums at once."""
    if rule.far and fk_BKF is not None:
        _add_far(fk_BKF[:, :, None], v_BGE[:, :, None], state, rows)
    state.seen_B[rows] += 1


def _add_far(fk_AKQF: Tensor, v_AGQE: Tensor, state: StudentState, rows: Tensor) -> None:
    wide = state.far_s_BKFE.dtype
    groups = fk_AKQF.to(wide).unflatten(1, (v_AGQE.shape[1], -1))
    sums = (groups.mT @ v_AGQE.to(wide)[:, :, None]).flatten(1, 2)
    state.far_s_BKFE.index_add_(0, rows, sums)
    state.far_z_BKF.index_add_(0, rows, fk_AKQF.to(wide).sum(2))


def _fold(state: StudentState, rows: Tensor, rule: Rule, phi_k: PhiK | None) -> None:
    """Buffered keys that were near for the last query and are far for the one to come join the far sums."""
    if not rule.far:
        return
    seen = state.seen_B[rows]
    count = rule.window if rule.kind == "terrace" else 1
    old = rule.near_start(seen - 1)
    leaving = (rule.near_start(seen) > old) & (old + count > rule.sinks)
    who = leaving.nonzero()[:, 0]
    if who.numel() == 0:
        return
    if phi_k is None:
        raise ValueError("phi_k is missing; a buffered key needs the key feature map to become far")
    folding = rows[who]
    position = old[who, None] + torch.arange(count, device=seen.device)
    index = (position % rule.slots)[:, None, :, None]
    k = state.k_BGND[folding].gather(2, index.expand(-1, state.k_BGND.shape[1], -1, state.k_BGND.shape[3]))
    v = state.v_BGNE[folding].gather(2, index.expand(-1, state.v_BGNE.shape[1], -1, state.v_BGNE.shape[3]))
    fk = phi_k(k)
    if rule.sinks:
        fk = fk.masked_fill((position < rule.sinks)[:, None, :, None], 0.0)
    _add_far(fk, v, state, folding)


def _store(k_BGD: Tensor, v_BGE: Tensor, state: StudentState, rows: Tensor, rule: Rule) -> None:
    """The new pair takes its slot (and its sink slot)."""
    position = state.seen_B[rows]
    slot = position % rule.slots
    state.k_BGND[rows, :, slot] = k_BGD.to(state.k_BGND.dtype)
    state.v_BGNE[rows, :, slot] = v_BGE.to(state.v_BGNE.dtype)
    if rule.sinks:
        early = (position < rule.sinks).nonzero()[:, 0]
        state.sink_k_BGSD[rows[early], :, position[early]] = k_BGD[early].to(state.k_BGND.dtype)
        state.sink_v_BGSE[rows[early], :, position[early]] = v_BGE[early].to(state.v_BGNE.dtype)
    state.seen_B[rows] += 1


def _read(
    q_BHD: Tensor,
    fq_BHF: Tensor | None,
    log_ratio_H: Tensor,
    state: StudentState,
    rows: Tensor,
    rule: Rule,
    sink_logit_H: Tensor | None,
) -> Tensor:
    """y [B, H, E] of the newest token of `rows`."""
    mine = state if rows.numel() == state.seen_B.shape[0] else state.index_select(rows)
    wide = mine.far_s_BKFE.dtype
    num, den = q_BHD.new_zeros((), dtype=wide), q_BHD.new_zeros((), dtype=wide)
    if rule.kind != "linear":
        p, total, v = _near(q_BHD.to(wide), mine, rule, sink_logit_H)
        near = (p @ v).flatten(1, 2)
        if not rule.far:
            return near
        den = log_ratio_H.to(wide).exp()[:, None] * total.flatten(1, 2)
        num = den * near
    if rule.far and fq_BHF is not None:
        key_maps = mine.far_s_BKFE.shape[1]
        fq = fq_BHF.to(wide).unflatten(1, (key_maps, -1))
        num = num + (fq @ mine.far_s_BKFE).flatten(1, 2)
        den = den + (fq @ mine.far_z_BKF[..., None]).flatten(1, 2)
    if rule.kind == "linear":
        den = den + LINEAR_EPS
        num = num.expand(*q_BHD.shape[:2], mine.v_BGNE.shape[-1])
    return num / den


def _near(q_BHD: Tensor, state: StudentState, rule: Rule, sink_logit_H: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax [B, G, n, N + S (+ 1)], sum of exp(s - c) [B, G, n, 1], values) of the newest token."""
    kv_heads = state.k_BGND.shape[1]
    k = torch.cat([state.k_BGND, state.sink_k_BGSD], 2).to(q_BHD.dtype)
    v = torch.cat([state.v_BGNE, state.sink_v_BGSE], 2).to(q_BHD.dtype)
    scores = (q_BHD.unflatten(1, (kv_heads, -1)) * rule.scale) @ k.mT
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    start = rule.near_start(state.seen_B - 1)[:, None]
    sink = torch.arange(rule.sinks, device=start.device)
    visible = torch.cat([state.slot_positions() >= start, sink < start], 1)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if sink_logit_H is not None:
        logit = sink_logit_H.to(scores.dtype).view(kv_heads, -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, logit], -1)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], 1, v.shape[3])], 2)
    p = scores.softmax(-1)
    return p, p.amax(-1, keepdim=True).reciprocal(), v
