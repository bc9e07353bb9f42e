"""Generation: one token after the other against a state of constant size, updated in place.

A token is one :func:`step` a layer, a function of tensors whose shapes never change and that never asks a tensor for
its value: it can be compiled, or captured as a CUDA graph. A chunk whose keys all become far together (kind `terrace`)
is folded into the far sums before the step, once in W tokens; when that is due is known from the state's own count of
positions, which is kept on the host, so the device is never waited for. Rows may stand at different positions. What
depends on positions alone (:class:`Places`) is computed once a token, for all layers.

Shape legend: B rows, H query heads = G * n, G key/value heads, K key maps (G or H), T new tokens, N buffer slots,
D key dim, E value dim, F features, S sinks, A rows that fold now, Q keys they fold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trenchcoat.ops.state import LINEAR_EPS, PhiK, Rule, StudentState, add_far


@dataclass(frozen=True)
class Places:
    """Where a token goes and what it sees, the same in every layer: `slot` int64 [B, 1, 1, 1], and the near set as
    `bias`, [B * G, 1, N + S] of 0 (near) and -inf."""

    slot: Tensor
    bias: Tensor

    @classmethod
    def of(cls, state: StudentState, rule: Rule, wide: torch.dtype) -> Places:
        """For the token at position `seen`, whose slot already holds it."""
        batch, kv_heads = state.k_BGND.shape[:2]
        seen_B1 = state.seen_B[:, None]
        age = (seen_B1 - torch.arange(rule.slots, device=seen_B1.device)).remainder(rule.slots)
        reach = seen_B1 - rule.near_start(seen_B1)
        visible = age <= reach
        if rule.sinks:
            sink = torch.arange(rule.sinks, device=seen_B1.device)
            visible = torch.cat([visible, sink < seen_B1 - reach], 1)
        bias = torch.zeros((), dtype=wide, device=seen_B1.device).masked_fill(~visible, float("-inf"))
        bias = bias[:, None, None].expand(-1, kv_heads, -1, -1).reshape(batch * kv_heads, 1, -1)
        return cls((seen_B1 % rule.slots)[:, :, None, None], bias)


_last: tuple[tuple[object, ...], Places] | None = None
"""The newest places and what they depend on: the other layers of the same token take them from here."""


def _places(state: StudentState, rule: Rule, wide: torch.dtype) -> Places:
    global _last
    known = _last
    window = (rule.kind, rule.window, rule.sinks)
    key = (state.positions(), window, state.k_BGND.shape[1], state.seen_B.device, wide)
    if known is not None and known[0] == key:
        return known[1]
    made = Places.of(state, rule, wide)
    _last = ((list(key[0]), *key[1:]), made)
    return made


def decode(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    fq_BHTF: Tensor | None,
    fk_BKTF: Tensor | None,
    ratio_H: Tensor,
    state: StudentState,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    mask_BT: Tensor | None = None,
    phi_k: PhiK | None = None,
) -> Tensor:
    """y [B, H, T, E] in q's dtype; a token with mask False changes nothing and gets 0. Call it under `no_grad`.

    `ratio_H` is g / l. Only kind `linear` reads `fk_BKTF`; the others compute a key's features when it leaves the
    buffer, with `phi_k`.
    """
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    y = []
    for t in range(q_BHTD.shape[2]):
        real_B = None if mask_BT is None else mask_BT[:, t].to(state.seen_B.device)
        if rule.kind == "linear":
            places = None
        else:
            if rule.far and rule.kind == "terrace":
                _fold_chunks(state, rule, phi_k, real_B)
            elif rule.far:
                _fold_oldest(state, rule, phi_k, real_B)
            places = _places(state, rule, wide)
        y.append(
            step(
                q_BHTD.select(2, t),
                k_BGTD.select(2, t),
                v_BGTE.select(2, t),
                None if fq_BHTF is None else fq_BHTF.select(2, t),
                None if fk_BKTF is None else fk_BKTF.select(2, t),
                ratio_H,
                state,
                places,
                rule=rule,
                sink_logit_H=sink_logit_H,
                real_B=real_B,
            )
        )
        state.count(real_B)
    return y[0].unsqueeze(2) if len(y) == 1 else torch.stack(y, 2)


def step(
    q_BHD: Tensor,
    k_BGD: Tensor,
    v_BGE: Tensor,
    fq_BHF: Tensor | None,
    fk_BKF: Tensor | None,
    ratio_H: Tensor,
    state: StudentState,
    places: Places | None,
    *,
    rule: Rule,
    sink_logit_H: Tensor | None = None,
    real_B: Tensor | None = None,
) -> Tensor:
    """y [B, H, E] of one token a row, whose pair joins the state; what leaves the buffer has been folded before.

    The caller counts the token (`StudentState.count`) afterwards. `places` is None for kind `linear` only.
    """
    if places is None:
        if rule.far and fk_BKF is not None:
            fk = fk_BKF if real_B is None else fk_BKF * real_B[:, None, None]
            add_far(state.far_s_BKFE, state.far_z_BKF, fk[:, :, None], v_BGE[:, :, None], state.seen_B)
        y = _read_linear(q_BHD, fq_BHF, state)
    else:
        _store(k_BGD, v_BGE, state, places, rule, real_B)
        y = _read(q_BHD, fq_BHF, ratio_H, state, places, rule, sink_logit_H)
    if y.dtype != q_BHD.dtype:
        y = y.to(q_BHD.dtype)
    return y if real_B is None else y * real_B[:, None, None]


# What becomes far


def _fold_chunks(state: StudentState, rule: Rule, phi_k: PhiK | None, real_B: Tensor | None) -> None:
    """Kind ``terrace``: at the first token of a chunk, the chunk before the last one becomes far."""
    window = rule.window
    position = state.positions()
    due = [b for b, n in enumerate(position) if n % window == 0 and n >= 2 * window and n - window > rule.sinks]
    if due and real_B is not None:
        real = real_B.tolist()
        due = [b for b in due if real[b]]
    for half in (0, 1):
        rows = [b for b in due if position[b] // window % 2 == half]
        if not rows:
            continue
        span = slice(half * window, (half + 1) * window)
        k, v, start = state.k_BGND[:, :, span], state.v_BGNE[:, :, span], state.seen_B
        index = None
        if len(rows) < len(position):
            index = torch.tensor(rows, device=start.device)
            k, v, start = k[index], v[index], start[index]
        far = start[:, None] - 2 * window + torch.arange(window, device=start.device) >= rule.sinks
        _fold(state, k, v, far if rule.sinks else None, phi_k, index)


def _fold_oldest(state: StudentState, rule: Rule, phi_k: PhiK | None, real_B: Tensor | None) -> None:
    """Kind ``sliding``: the oldest key of a full buffer becomes far, in the slot that the new one will take."""
    position = state.seen_B - rule.window
    far = position >= rule.sinks
    if real_B is not None:
        far = far & real_B
    slot = (state.seen_B % rule.slots)[:, None, None, None]
    k = state.k_BGND.gather(2, slot.expand(-1, *_one_slot(state.k_BGND)))
    v = state.v_BGNE.gather(2, slot.expand(-1, *_one_slot(state.v_BGNE)))
    _fold(state, k, v, far[:, None], phi_k, None)


def _fold(
    state: StudentState, k_AGQD: Tensor, v_AGQE: Tensor, far_AQ: Tensor | None, phi_k: PhiK | None, rows: Tensor | None
) -> None:
    if phi_k is None:
        raise ValueError("phi_k is missing; a buffered key needs the key feature map to become far")
    fk = phi_k(k_AGQD)
    if far_AQ is not None:
        fk = fk.masked_fill(~far_AQ[:, None, :, None], 0.0)
    if rows is None:
        add_far(state.far_s_BKFE, state.far_z_BKF, fk, v_AGQE, state.seen_B)
        return
    s, z = state.far_s_BKFE[rows], state.far_z_BKF[rows]
    add_far(s, z, fk, v_AGQE, state.seen_B[rows])
    state.far_s_BKFE[rows], state.far_z_BKF[rows] = s, z


def _one_slot(buffer_BGNX: Tensor) -> tuple[int, int, int]:
    return buffer_BGNX.shape[1], 1, buffer_BGNX.shape[3]


# The step


def _store(
    k_BGD: Tensor, v_BGE: Tensor, state: StudentState, places: Places, rule: Rule, real_B: Tensor | None
) -> None:
    """The new pair takes its slot (and its sink slot)."""
    for new, buffer in ((k_BGD, state.k_BGND), (v_BGE, state.v_BGNE)):
        index, pair = places.slot.expand(-1, *_one_slot(buffer)), new.unsqueeze(2)
        if pair.dtype != buffer.dtype:
            pair = pair.to(buffer.dtype)
        if real_B is not None:
            pair = torch.where(real_B[:, None, None, None], pair, buffer.gather(2, index))
        buffer.scatter_(2, index, pair)
    if rule.sinks:
        here = torch.arange(rule.sinks, device=state.seen_B.device) == state.seen_B[:, None]
        if real_B is not None:
            here = here & real_B[:, None]
        here = here[:, None, :, None]
        for new, sink in ((k_BGD, state.sink_k_BGSD), (v_BGE, state.sink_v_BGSE)):
            sink.copy_(torch.where(here, new[:, :, None].to(sink.dtype), sink))


def _read(
    q_BHD: Tensor,
    fq_BHF: Tensor | None,
    ratio_H: Tensor,
    state: StudentState,
    places: Places,
    rule: Rule,
    sink_logit_H: Tensor | None,
) -> Tensor:
    """y [B, H, E] of the token just stored: with p the softmax over the near set and m its largest weight,
    y = (r p v + fq S) / (r + fq z) with r = g / (l m), as the sum of exp(s - c) over the near set is 1 / m.
    """
    batch, heads, _ = q_BHD.shape
    p, v = _near(q_BHD, state, places, rule, sink_logit_H)
    if not rule.far or fq_BHF is None:
        return torch.bmm(p, v).view(batch, heads, -1)
    s, z, fq = _far(fq_BHF, state, p.dtype)
    maps = s.shape[0]
    r = ratio_H.to(p.dtype) / p.amax(-1).view(batch, heads)
    near = torch.bmm(p * r.view(p.shape[0], -1, 1), v)
    num = torch.baddbmm(near.view(maps, -1, v.shape[2]), fq, s)
    den = r.view(maps, -1) + (fq * z).sum(-1)
    return (num / den.unsqueeze(-1)).view(batch, heads, -1)


def _read_linear(q_BHD: Tensor, fq_BHF: Tensor | None, state: StudentState) -> Tensor:
    batch, heads = q_BHD.shape[:2]
    if fq_BHF is None:
        return q_BHD.new_zeros(batch, heads, state.v_BGNE.shape[3])
    s, z, fq = _far(fq_BHF, state, torch.promote_types(q_BHD.dtype, torch.float32))
    return (torch.bmm(fq, s) / ((fq * z).sum(-1, keepdim=True) + LINEAR_EPS)).view(batch, heads, -1)


def _far(fq_BHF: Tensor, state: StudentState, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [B * K, F, E] and [B * K, 1, F], and the features of the queries that read them [B * K, H / K, F]."""
    rows, maps, features, values = state.far_s_BKFE.shape
    fq = fq_BHF.to(wide).reshape(rows * maps, -1, features)
    s, z = state.far_s_BKFE.to(wide), state.far_z_BKF.to(wide)
    return s.view(rows * maps, features, values), z.view(rows * maps, 1, features), fq


def _near(
    q_BHD: Tensor, state: StudentState, places: Places, rule: Rule, sink_logit_H: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(softmax [B * G, n, N + S (+ 1)], values [B * G, N + S (+ 1), E]) of the token just stored."""
    batch, kv_heads, wide = q_BHD.shape[0], state.k_BGND.shape[1], places.bias.dtype
    k, v = state.k_BGND, state.v_BGNE
    if rule.sinks:
        k, v = torch.cat([k, state.sink_k_BGSD], 2), torch.cat([v, state.sink_v_BGSE], 2)
    k, v = k.to(wide).flatten(0, 1), v.to(wide).flatten(0, 1)
    q = q_BHD.to(wide).reshape(batch * kv_heads, -1, q_BHD.shape[2])
    if rule.softcap is None:
        scores = torch.baddbmm(places.bias, q, k.mT, alpha=rule.scale)
    else:
        scores = rule.softcap * torch.tanh(torch.bmm(q, k.mT) * (rule.scale / rule.softcap)) + places.bias
    if sink_logit_H is not None:
        logit = sink_logit_H.to(wide).view(1, kv_heads, -1, 1).expand(batch, -1, -1, -1)
        scores = torch.cat([scores, logit.reshape(*scores.shape[:2], 1)], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    return scores.softmax(-1), v
