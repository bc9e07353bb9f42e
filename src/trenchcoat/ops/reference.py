"""The operator's definition: the quadratic formula, in float32 or wider. Slow and simple; every test compares with it.

For the query at position n of a row (positions count its real tokens, from 0), near set N(n), far set R(n):

    y_n = [ sum_{j in N} g exp(s_nj - c_n) v_j + l sum_{j in R} (phi_q(q_n) . phi_k(k_j)) v_j ]
        / [ sum_{j in N} g exp(s_nj - c_n)     + l sum_{j in R} (phi_q(q_n) . phi_k(k_j))     ]

    s_nj = scale q_n . k_j (soft-capped: cap tanh(s / cap));  c_n = max_{j in N} s_nj;  g = sigmoid(mix_h);
    l = 1, or 1 - g when `affine`.

* ``terrace``: N = { j <= n : j >= (floor(n / W) - 1) W };  ``sliding``: N = { n - W < j <= n };  ``linear``: N empty,
  R = { j <= n }, l = 1, 1e-12 is added to the denominator; mix, scale, soft-cap and sink logit are not used.
* `sinks` = S: positions 0..S-1 are near for every later query, hence never far.
* `sink_logit_H` (a learned sink without value): c_n = max(c_n, sink_h) and g exp(sink_h - c_n) joins the denominator.
* `far=False` leaves R out of both sums (kind ``linear`` then returns 0).
* A token with mask False does not exist: it has no position, no query sees it, and its output is 0.
* c_n is part of the function and so is its gradient (it does not cancel: the far sum is not scaled by exp(-c_n)).
  If several scores tie for the maximum, any convex combination of their gradients may be returned.

Gradients flow to q, k, v, the features, the mix and the sink logit, never through a state.
Source: LoLCATs, https://arxiv.org/abs/2410.10254, with terraces aligned to the first real token so that it is causal.

Shape legend: B rows, H query heads, G key/value heads, K heads of the key map (H or G), T new tokens, J keys (buffered
and new), D key dim, E value dim, F features, S sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trenchcoat.ops.state import LINEAR_EPS, Features, HeadWeights, PhiK, Rule, StudentState, Tokens


def attention_outputs(
    tokens: Tokens, features: Features | None, heads: HeadWeights, rule: Rule, state: StudentState | None = None
) -> Tensor:
    """y [B, H, T, E] in q's dtype; arguments as in :func:`trenchcoat.ops.linear_window_attention`."""
    dtype = tokens.q_BHTD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q_BHTD = tokens.q_BHTD.to(wide)
    real_BT, position_BT = _positions(tokens, state)
    keys = _Keys(tokens, features if rule.far else None, position_BT, real_BT, wide)
    if state is not None:
        keys.prepend_state(state, rule, None if features is None else features.phi_k)
    near_num, near_den = _near(q_BHTD, keys, position_BT, heads.sink_logit_H, rule)
    gain_H11 = torch.sigmoid(heads.mix_H.to(wide))[:, None, None]
    num, den = gain_H11 * near_num, gain_H11 * near_den
    if rule.kind == "linear":
        num, den = torch.zeros_like(num), torch.full_like(den, LINEAR_EPS)
    if rule.far:
        assert features is not None
        far_num, far_den = _far(features.q_BHTF.to(wide), keys, position_BT, state, rule)
        weight = 1 - gain_H11 if rule.affine and rule.kind != "linear" else 1.0
        num, den = num + weight * far_num, den + weight * far_den
    real_B1T1 = real_BT[:, None, :, None]
    y = torch.where(real_B1T1, num / torch.where(real_B1T1, den, 1.0), 0.0)
    return y.to(dtype)


def next_state(tokens: Tokens, features: Features | None, rule: Rule, state: StudentState) -> StudentState:
    """The state after the tokens, one token at a time; `state` itself is not modified."""
    state = state.clone()
    real_BT, _ = _positions(tokens, None)
    k_BGTD, v_BGTE = tokens.k_BGTD.detach(), tokens.v_BGTE.detach()
    fk_BKTF, phi_k = (None, None) if features is None else (features.k_BKTF, features.phi_k)
    for b in range(k_BGTD.shape[0]):
        for t in real_BT[b].nonzero()[:, 0].tolist():
            feature = None if fk_BKTF is None else fk_BKTF[b, :, t].detach()
            _append(state, b, k_BGTD[b, :, t], v_BGTE[b, :, t], feature, rule, phi_k)
    return state


def _append(
    state: StudentState, b: int, k_GD: Tensor, v_GE: Tensor, fk_KF: Tensor | None, rule: Rule, phi_k: PhiK | None
) -> None:
    """One token of row b: fold the keys that are far for its query, then store the token."""
    n = int(state.seen_B[b])
    if rule.kind == "linear":
        if rule.far and fk_KF is not None:
            v_KE = _to_heads(v_GE[None], fk_KF.shape[0])[0].to(state.far_s_BKFE.dtype)
            state.far_s_BKFE[b] += fk_KF[:, :, None] * v_KE[:, None, :]
            state.far_z_BKF[b] += fk_KF
        state.seen_B[b] += 1
        return
    if rule.far:
        position = torch.tensor([n - 1, n], device=state.seen_B.device)
        before, after = rule.near_start(position).tolist()
        for p in range(max(before, rule.sinks), after):
            assert phi_k is not None
            slot = p % rule.slots
            fk = phi_k(state.k_BGND[b : b + 1, :, slot : slot + 1])[0, :, 0].to(state.far_s_BKFE.dtype)
            v = _to_heads(state.v_BGNE[b : b + 1, :, slot], fk.shape[0])[0].to(state.far_s_BKFE.dtype)
            state.far_s_BKFE[b] += fk[:, :, None] * v[:, None, :]
            state.far_z_BKF[b] += fk
    state.k_BGND[b, :, n % rule.slots] = k_GD.to(state.k_BGND.dtype)
    state.v_BGNE[b, :, n % rule.slots] = v_GE.to(state.v_BGNE.dtype)
    if n < rule.sinks:
        state.sink_k_BGSD[b, :, n] = k_GD.to(state.k_BGND.dtype)
        state.sink_v_BGSE[b, :, n] = v_GE.to(state.v_BGNE.dtype)
    state.seen_B[b] += 1


def weights(tokens: Tokens, features: Features | None, heads: HeadWeights, rule: Rule) -> Tensor:
    """The student's attention map, [B, H, T, T (+ 1 with a sink logit)]: y = weights @ v. Rows sum to 1."""
    q_BHTD = tokens.q_BHTD
    real_BT, position_BT = _positions(tokens, None)
    keys = _Keys(tokens, features if rule.far else None, position_BT, real_BT, q_BHTD.dtype)
    gain_H11 = torch.sigmoid(heads.mix_H.to(q_BHTD.dtype))[:, None, None]
    map_BHTJ = torch.zeros_like(q_BHTD[..., :1]).expand(*q_BHTD.shape[:3], q_BHTD.shape[2])
    sink_BHT1 = None
    if rule.kind != "linear":
        near_BHTJ, sink_BHT1 = _near_weights(q_BHTD, keys, position_BT, heads.sink_logit_H, rule)
        map_BHTJ = gain_H11 * near_BHTJ
    if rule.far:
        assert features is not None
        weight = 1 - gain_H11 if rule.affine and rule.kind != "linear" else 1.0
        map_BHTJ = map_BHTJ + weight * _far_weights(features.q_BHTF, keys, position_BT, rule)
    if sink_BHT1 is not None:
        map_BHTJ = torch.cat([map_BHTJ, gain_H11 * sink_BHT1], -1)
    den = map_BHTJ.sum(-1, keepdim=True) + (LINEAR_EPS if rule.kind == "linear" else 0.0)
    real_B1T1 = real_BT[:, None, :, None]
    return torch.where(real_B1T1, map_BHTJ / torch.where(real_B1T1, den, 1.0), 0.0)


def teacher_weights(
    tokens: Tokens, rule: Rule, sink_logit_H: Tensor | None = None, teacher_window: int | None = None
) -> Tensor:
    """The softmax attention map, causal (and limited to the last `teacher_window` tokens), same shape as `weights`."""
    real_BT, position_BT = _positions(tokens, None)
    query, key = position_BT[:, None, :, None], position_BT[:, None, None, :]
    seen = (key <= query) & real_BT[:, None, None, :]
    if teacher_window is not None:
        seen = seen & (key > query - teacher_window)
    scores = _scores(tokens.q_BHTD, tokens.k_BGTD, rule).masked_fill(~seen, float("-inf"))
    if sink_logit_H is not None:
        scores = torch.cat([scores, sink_logit_H.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    map_BHTJ = scores.masked_fill(~real_BT[:, None, :, None], 0.0).softmax(-1)
    return map_BHTJ.masked_fill(~real_BT[:, None, :, None], 0.0)


class _Keys:
    """Keys with their positions and mask; prepending a state makes buffered pairs ordinary keys."""

    def __init__(
        self, tokens: Tokens, features: Features | None, position_BJ: Tensor, real_BJ: Tensor, dtype: torch.dtype
    ) -> None:
        self.k, self.v = tokens.k_BGTD.to(dtype), tokens.v_BGTE.to(dtype)
        self.fk = None if features is None or features.k_BKTF is None else features.k_BKTF.to(dtype)
        self.position_BJ, self.real_BJ = position_BJ, real_BJ

    def prepend_state(self, state: StudentState, rule: Rule, phi_k: PhiK | None) -> None:
        """Prepend the state's sinks and buffered pairs."""
        seen_B1 = state.seen_B[:, None]
        buffered_BN = state.slot_positions()
        first_B1 = rule.near_start(seen_B1 - 1)
        sink_BS = torch.arange(rule.sinks, device=seen_B1.device).expand(seen_B1.shape[0], -1)
        k = torch.cat([state.sink_k_BGSD, state.k_BGND], 2).to(self.k.dtype)
        v = torch.cat([state.sink_v_BGSE, state.v_BGNE], 2).to(self.v.dtype)
        position = torch.cat([sink_BS, buffered_BN], 1)
        real = torch.cat([sink_BS < first_B1.clamp_max(seen_B1), (buffered_BN >= first_B1) & (seen_B1 > 0)], 1)
        if self.fk is not None:
            if phi_k is None and k.shape[2]:
                raise ValueError("a state with buffered keys needs phi_k, the key feature map, to let them become far")
            fk = self.fk[:, :, :0] if phi_k is None or not k.shape[2] else phi_k(k).to(self.fk.dtype).detach()
            self.fk = torch.cat([fk, self.fk], 2)
        self.k, self.v = torch.cat([k, self.k], 2), torch.cat([v, self.v], 2)
        self.position_BJ = torch.cat([position, self.position_BJ], 1)
        self.real_BJ = torch.cat([real, self.real_BJ], 1)


def _positions(tokens: Tokens, state: StudentState | None) -> tuple[Tensor, Tensor]:
    """(mask, position) of each token, both [B, T]."""
    mask_BT, like_BT = tokens.mask_BT, tokens.k_BGTD[:, 0, :, 0]
    real = torch.ones_like(like_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    position = real.long().cumsum(1) - 1
    return real, position if state is None else position + state.seen_B[:, None]


def _to_heads(x_BG: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads for the query heads that share them."""
    return x_BG.repeat_interleave(heads // x_BG.shape[1], dim=1)


def _scores(q_BHTD: Tensor, k_BGJD: Tensor, rule: Rule) -> Tensor:
    scores = rule.scale * q_BHTD @ _to_heads(k_BGJD, q_BHTD.shape[1]).mT
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def _near_weights(
    q_BHTD: Tensor, keys: _Keys, position_BT: Tensor, sink_logit_H: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor | None]:
    """exp(s - c) on the near set, 0 elsewhere, and the sink's weight; both without g."""
    near = rule.is_near(position_BT[:, None, :, None], keys.position_BJ[:, None, None, :])
    near = near & keys.real_BJ[:, None, None, :]
    scores = _scores(q_BHTD, keys.k, rule)
    lowest = torch.finfo(scores.dtype).min
    largest = scores.masked_fill(~near, lowest).amax(-1, keepdim=True)
    if sink_logit_H is not None:
        sink = sink_logit_H.to(scores.dtype)[:, None, None]
        largest = torch.maximum(largest, sink)
        return torch.exp((scores - largest).masked_fill(~near, float("-inf"))), torch.exp(sink - largest)
    largest = torch.where(near.any(-1, keepdim=True), largest, 0.0)
    return torch.exp((scores - largest).masked_fill(~near, float("-inf"))), None


def _near(
    q_BHTD: Tensor, keys: _Keys, position_BT: Tensor, sink_logit_H: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    if rule.kind == "linear":
        num = torch.zeros(*q_BHTD.shape[:3], keys.v.shape[-1], dtype=q_BHTD.dtype, device=q_BHTD.device)
        return num, num[..., :1]
    near, sink = _near_weights(q_BHTD, keys, position_BT, sink_logit_H, rule)
    den = near.sum(-1, keepdim=True)
    return near @ _to_heads(keys.v, q_BHTD.shape[1]), den if sink is None else den + sink


def _far_weights(fq_BHTF: Tensor, keys: _Keys, position_BT: Tensor, rule: Rule) -> Tensor:
    assert keys.fk is not None
    far = rule.is_far(position_BT[:, None, :, None], keys.position_BJ[:, None, None, :])
    far = far & keys.real_BJ[:, None, None, :]
    return (fq_BHTF @ _to_heads(keys.fk, fq_BHTF.shape[1]).mT).masked_fill(~far, 0.0)


def _far(
    fq_BHTF: Tensor, keys: _Keys, position_BT: Tensor, state: StudentState | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    far = _far_weights(fq_BHTF, keys, position_BT, rule)
    num, den = far @ _to_heads(keys.v, fq_BHTF.shape[1]), far.sum(-1, keepdim=True)
    if state is None:
        return num, den
    s = _to_heads(state.far_s_BKFE, fq_BHTF.shape[1]).to(fq_BHTF.dtype)
    z = _to_heads(state.far_z_BKF, fq_BHTF.shape[1]).to(fq_BHTF.dtype)
    return num + fq_BHTF @ s, den + fq_BHTF @ z[..., None]
