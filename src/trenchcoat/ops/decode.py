"""Generation: one token at a time against a state of constant size, updated in place.

A token is one :func:`step` per layer, a function of fixed tensor shapes that never reads a tensor's value on the host:
it can be compiled, or captured as a CUDA graph. A chunk whose keys all become far together (kind `terrace`) is folded
into the far sums before the step, once every W tokens; the state counts positions on the host to know when, so there is
no device synchronisation. Rows may be at different positions. What depends on positions alone (:class:`Places`) is
computed once per token, for all layers.

Shape legend: B rows, H query heads = G * n, G key/value heads, K key maps (G or H), T new tokens, N buffer slots,
D key dim, E value dim, F features, S sinks, A rows that fold now, Q keys they fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trenchcoat.ops.state import LINEAR_EPS, Features, HeadWeights, PhiK, Rule, StudentState, Tokens, add_far


@dataclass(frozen=True)
class Places:
    """Where a token is stored and what it sees, the same in every layer: its slot as `key_slot` int64 [B, G, 1, D] and
    `value_slot` [B, G, 1, E], and the near set as `bias`, [B * G, 1, N + S] of 0 (near) and -inf."""

    key_slot: Tensor
    value_slot: Tensor
    bias: Tensor

    @classmethod
    def of(cls, state: StudentState, rule: Rule, wide: torch.dtype) -> Places:
        """For the token at position `seen`, already stored in its slot."""
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
        slot = (seen_B1 % rule.slots)[:, :, None, None]
        sizes = [(kv_heads, 1, buffer.shape[3]) for buffer in (state.k_BGND, state.v_BGNE)]
        return cls(slot.expand(-1, *sizes[0]), slot.expand(-1, *sizes[1]), bias)


_RECENT = 256
_recent: dict[tuple[object, ...], Places] = {}
"""The latest places by what they depend on, for the other layers of the same token; the oldest first."""


def _places(state: StudentState, rule: Rule, wide: torch.dtype) -> Places:
    window = (rule.kind, rule.window, rule.sinks)
    sizes = (*state.k_BGND.shape, state.v_BGNE.shape[3])
    key = (tuple(state.positions()), window, sizes, state.seen_B.device, wide)
    known = _recent.get(key)
    if known is None:
        known = _recent[key] = Places.of(state, rule, wide)
        if len(_recent) > _RECENT:
            del _recent[next(iter(_recent))]
    return known


def decode(tokens: Tokens, features: Features | None, heads: HeadWeights, state: StudentState, rule: Rule) -> Tensor:
    """y [B, H, T, E] in q's dtype; a token with mask False changes nothing and outputs 0. Call under `no_grad`.

    Only kind `linear` reads the keys' features; the others compute a key's features when it leaves the buffer.
    """
    wide = torch.promote_types(tokens.q_BHTD.dtype, torch.float32)
    phi_k = None if features is None else features.phi_k
    y, count = [], tokens.q_BHTD.shape[2]
    for t in range(count):
        one = tokens if count == 1 else tokens[t : t + 1]
        real_B, places = _real(one, state), None
        if rule.kind != "linear":
            if rule.far:
                fold = _fold_chunks if rule.kind == "terrace" else _fold_oldest
                fold(state, rule, phi_k, real_B)
            places = _places(state, rule, wide)
        far = features if features is None or count == 1 else features[t : t + 1]
        y.append(step(one, far, heads, state, places, rule))
        state.count(real_B)
    return y[0] if count == 1 else torch.cat(y, 2)


def decode_rows(
    tokens: Tokens, features: Features | None, heads: HeadWeights, states: Sequence[StudentState], rule: Rule
) -> Tensor:
    """`decode` of one token [B, ...] for each of B states of one row, such as views of a server's pages."""
    simple = rule.kind != "linear" and not rule.sinks and rule.softcap is None and heads.sink_logit_H is None
    if simple:
        return _decode_rows(tokens, features if rule.far else None, heads, states, rule)
    outputs = []
    for row, state in enumerate(states):
        one = slice(row, row + 1)
        token = Tokens(tokens.q_BHTD[one], tokens.k_BGTD[one], tokens.v_BGTE[one])
        outputs.append(decode(token, None if features is None else features.rows(one), heads, state, rule))
    return torch.cat(outputs)


def _decode_rows(
    tokens: Tokens, features: Features | None, heads: HeadWeights, states: Sequence[StudentState], rule: Rule
) -> Tensor:
    """As :func:`_read`, where only the products with a state's own tensors are computed row by row."""
    q, wide = tokens.q_BHTD, torch.promote_types(tokens.q_BHTD.dtype, torch.float32)
    kv_heads, shape = tokens.k_BGTD.shape[1], (*q.shape[:3], tokens.v_BGTE.shape[3])
    q_BGnD = _in(q, wide).reshape(len(states), kv_heads, -1, q.shape[3])
    p = q_BGnD.new_empty(*q_BGnD.shape[:3], rule.slots)
    for row, state in enumerate(states):
        if features is not None:
            (_fold_chunks if rule.kind == "terrace" else _fold_oldest)(state, rule, features.phi_k, None)
        slot, bias = state.positions()[0] % rule.slots, _places(state, rule, wide).bias
        state.k_BGND[0, :, slot] = tokens.k_BGTD[row, :, 0]
        state.v_BGNE[0, :, slot] = tokens.v_BGTE[row, :, 0]
        torch.baddbmm(bias, q_BGnD[row], _in(state.k_BGND[0], wide).mT, alpha=rule.scale, out=p[row])
        state.count()
    p = p.softmax(-1)
    y = p.new_empty(shape)
    weights = p
    if features is not None:
        r = _in(rule.ratio(heads.mix_H), wide).view(kv_heads, -1) / p.amax(-1)
        weights = p * r[..., None]
    for row, state in enumerate(states):
        torch.bmm(weights[row], _in(state.v_BGNE[0], wide), out=y[row].view(kv_heads, -1, shape[3]))
    if features is None:
        return _in(y, q.dtype)
    maps = states[0].far_z_BKF.shape[1]
    fq = _in(features.q_BHTF, wide).reshape(len(states), maps, -1, features.q_BHTF.shape[3])
    for row, state in enumerate(states):
        y[row].view(maps, -1, shape[3]).baddbmm_(fq[row], _in(state.far_s_BKFE[0], wide))
    z = torch.cat([_in(state.far_z_BKF, wide) for state in states])
    return _in(y / (r.flatten(1) + torch.matmul(fq, z[..., None]).flatten(1))[..., None, None], q.dtype)


def step(
    token: Tokens,
    features: Features | None,
    heads: HeadWeights,
    state: StudentState,
    places: Places | None,
    rule: Rule,
) -> Tensor:
    """y [B, H, 1, E] of one token per row, stored into the state; keys that leave the buffer are already folded.

    The caller then counts the token (`StudentState.count`). `places` is None for kind `linear` only.
    """
    q_BH1D, real_B = token.q_BHTD, _real(token, state)
    fq_BH1F = fk_BK1F = None
    if features is not None and rule.far:
        fq_BH1F, fk_BK1F = features.q_BHTF, features.k_BKTF
    if places is None:
        if fk_BK1F is not None:
            fk = fk_BK1F if real_B is None else fk_BK1F * real_B[:, None, None, None]
            add_far(state.far_s_BKFE, state.far_z_BKF, fk, token.v_BGTE, state.seen_B)
        y = _read_linear(q_BH1D, fq_BH1F, state)
    else:
        _store(token, state, places, rule, real_B)
        y = _read(q_BH1D, fq_BH1F, heads, state, places, rule)
    if y.dtype != q_BH1D.dtype:
        y = y.to(q_BH1D.dtype)
    return y if real_B is None else y * real_B[:, None, None, None]


def _real(token: Tokens, state: StudentState) -> Tensor | None:
    return None if token.mask_BT is None else token.mask_BT[:, 0].to(state.seen_B.device)


# What becomes far


def _fold_chunks(state: StudentState, rule: Rule, phi_k: PhiK | None, real_B: Tensor | None) -> None:
    """Kind ``terrace``: at the first token of a chunk, the second to last chunk becomes far."""
    for half, index in chunks_due(state, rule, real_B):
        span = slice(half * rule.window, (half + 1) * rule.window)
        k, v, start = state.k_BGND[:, :, span], state.v_BGNE[:, :, span], state.seen_B
        if index is not None:
            k, v, start = k[index], v[index], start[index]
        far = start[:, None] - 2 * rule.window + torch.arange(rule.window, device=start.device) >= rule.sinks
        _fold(state, k, v, far if rule.sinks else None, phi_k, index)


def chunks_due(state: StudentState, rule: Rule, real_B: Tensor | None) -> Iterator[tuple[int, Tensor | None]]:
    """Chunks that become far with the next token (those where `real_B` is True): (half of the buffer, rows that have
    theirs there; None for all)."""
    window, position = rule.window, state.positions()
    due = [b for b, n in enumerate(position) if n % window == 0 and n >= 2 * window and n - window > rule.sinks]
    if due and real_B is not None:
        real = real_B.tolist()
        due = [b for b in due if real[b]]
    for half in (0, 1):
        rows = [b for b in due if position[b] // window % 2 == half]
        if rows:
            yield half, None if len(rows) == len(position) else torch.tensor(rows, device=state.seen_B.device)


def _fold_oldest(state: StudentState, rule: Rule, phi_k: PhiK | None, real_B: Tensor | None) -> None:
    """Kind ``sliding``: the oldest key of a full buffer becomes far; the new key takes its slot."""
    position = state.seen_B - rule.window
    far = position >= rule.sinks
    if real_B is not None:
        far = far & real_B
    slot = (state.seen_B % rule.slots)[:, None, None, None]
    k, v = (x.gather(2, slot.expand(-1, x.shape[1], 1, x.shape[3])) for x in (state.k_BGND, state.v_BGNE))
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


# The step


def _store(token: Tokens, state: StudentState, places: Places, rule: Rule, real_B: Tensor | None) -> None:
    """Write the new pair to its slot (and its sink slot)."""
    k_BG1D, v_BG1E = token.k_BGTD, token.v_BGTE
    slots = (k_BG1D, state.k_BGND, places.key_slot), (v_BG1E, state.v_BGNE, places.value_slot)
    for new, buffer, index in slots:
        pair = _in(new, buffer.dtype)
        if real_B is not None:
            pair = torch.where(real_B[:, None, None, None], pair, buffer.gather(2, index))
        buffer.scatter_(2, index, pair)
    if rule.sinks:
        here = torch.arange(rule.sinks, device=state.seen_B.device) == state.seen_B[:, None]
        if real_B is not None:
            here = here & real_B[:, None]
        here = here[:, None, :, None]
        for new, sink in ((k_BG1D, state.sink_k_BGSD), (v_BG1E, state.sink_v_BGSE)):
            sink.copy_(torch.where(here, new.to(sink.dtype), sink))


def _read(
    q_BH1D: Tensor,
    fq_BH1F: Tensor | None,
    heads: HeadWeights,
    state: StudentState,
    places: Places,
    rule: Rule,
) -> Tensor:
    """y [B, H, 1, E] of the token just stored: with p the softmax over the near set and m its largest weight,
    y = (r p v + fq S) / (r + fq z) with r = g / (l m), as the sum of exp(s - c) over the near set is 1 / m.
    """
    shape = (*q_BH1D.shape[:3], -1)
    batch = shape[0]
    p, v = _near(q_BH1D, state, places, rule, heads.sink_logit_H)
    if fq_BH1F is None:
        return torch.bmm(p, v).view(shape)
    s, z, fq = _far(fq_BH1F, state, p.dtype)
    r = _in(rule.ratio(heads.mix_H), p.dtype).view(-1, p.shape[1]) / p.amax(-1).view(batch, -1, p.shape[1])
    near = torch.bmm(p * r.view(p.shape[0], -1, 1), v)
    num = torch.baddbmm(near.view(s.shape[0], -1, s.shape[2]), fq, s)
    den = torch.baddbmm(r.view(s.shape[0], -1, 1), fq, z)
    return (num / den).view(shape)


def _read_linear(q_BH1D: Tensor, fq_BH1F: Tensor | None, state: StudentState) -> Tensor:
    batch, heads = q_BH1D.shape[:2]
    if fq_BH1F is None:
        return q_BH1D.new_zeros(batch, heads, 1, state.v_BGNE.shape[3])
    s, z, fq = _far(fq_BH1F, state, torch.promote_types(q_BH1D.dtype, torch.float32))
    return (torch.bmm(fq, s) / (torch.bmm(fq, z) + LINEAR_EPS)).view(batch, heads, 1, -1)


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _far(fq_BH1F: Tensor, state: StudentState, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [B * K, F, E] and [B * K, F, 1], and the features of the queries that read them [B * K, H / K, F]."""
    rows, maps, features, values = state.far_s_BKFE.shape
    fq = _in(fq_BH1F, wide).reshape(rows * maps, -1, features)
    s, z = _in(state.far_s_BKFE, wide), _in(state.far_z_BKF, wide)
    return s.view(rows * maps, features, values), z.view(rows * maps, features, 1), fq


def _near(
    q_BH1D: Tensor, state: StudentState, places: Places, rule: Rule, sink_logit_H: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(softmax [B * G, n, N + S (+ 1)], values [B * G, N + S (+ 1), E]) of the token just stored."""
    batch, kv_heads, wide = q_BH1D.shape[0], state.k_BGND.shape[1], places.bias.dtype
    k, v = state.k_BGND, state.v_BGNE
    if rule.sinks:
        k, v = torch.cat([k, state.sink_k_BGSD], 2), torch.cat([v, state.sink_v_BGSE], 2)
    k, v = _in(k, wide).flatten(0, 1), _in(v, wide).flatten(0, 1)
    q = _in(q_BH1D, wide).reshape(batch * kv_heads, -1, q_BH1D.shape[3])
    if rule.softcap is None:
        scores = torch.baddbmm(places.bias, q, k.mT, alpha=rule.scale)
    else:
        scores = rule.softcap * torch.tanh(torch.bmm(q, k.mT) * (rule.scale / rule.softcap)) + places.bias
    if sink_logit_H is not None:
        logit = sink_logit_H.to(wide).view(1, kv_heads, -1, 1).expand(batch, -1, -1, -1)
        scores = torch.cat([scores, logit.reshape(*scores.shape[:2], 1)], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    return scores.softmax(-1), v
