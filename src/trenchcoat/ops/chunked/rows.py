"""Align rows for the chunkwise implementation: no padding between tokens, chunk-aligned start, buffered keys first.

A padded row is compacted to the left. To continue a state, the keys that were near for its last query are prepended to
the new tokens; they start at a chunk boundary by construction, and their outputs are discarded. Everything older is the
initial value of the far sums.

Shape legend: B rows, H query heads, G key/value heads, K key maps, T new tokens, L aligned length, N buffer slots,
S sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trenchcoat.ops.state import Rule, StudentState, add_far


@dataclass(frozen=True)
class Rows:
    """Where every token goes. `source_BL` indexes cat(buffer, new tokens); `target_BT` is a new token's aligned index.

    Both are None if the tokens can be used as they are, after the keys in `slots`.
    """

    real_BT: Tensor | None
    length_B: Tensor | None
    """Tokens of the aligned row; None means all T."""
    first_B: Tensor
    """Position of aligned token 0."""
    source_BL: Tensor | None
    target_BT: Tensor | None
    slots: tuple[slice, ...] | None = None
    """Where the buffered keys are that come first, in order, when all rows continue from one position and none has
    padding; else None."""

    @classmethod
    def plan(cls, batch: int, tokens: int, rule: Rule, mask_BT: Tensor | None, state: StudentState | None) -> Rows:
        """Choose the alignment from mask and state."""
        device = None if mask_BT is None else mask_BT.device
        device = state.seen_B.device if state is not None else device
        zero_B = torch.zeros(batch, dtype=torch.int64, device=device)
        if mask_BT is None and state is None:
            return cls(None, None, zero_B, None, None)
        if mask_BT is None and state is not None and len(set(state.positions())) == 1:
            return cls._continued(state, rule)
        real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if mask_BT is None else mask_BT.bool()
        count_B = real.sum(1)
        if state is None and bool((real == (torch.arange(tokens, device=device) < count_B[:, None])).all()):
            full = bool((count_B == tokens).all())
            return cls(None if full else real, None if full else count_B, zero_B, None, None)
        seen_B = zero_B if state is None else state.seen_B
        first_B = torch.minimum(rule.near_start(seen_B - 1), seen_B)
        ahead_B = seen_B - first_B
        target_BT = ahead_B[:, None] + real.long().cumsum(1) - 1
        length = max(1, int((ahead_B + count_B).max()))
        place = torch.arange(length, device=device)
        order = real.long().argsort(dim=1, descending=True, stable=True)
        new = (place - ahead_B[:, None]).clamp(0, tokens - 1)
        slots = rule.slots if state is not None else 0
        source = order.gather(1, new) + slots
        if slots:
            source = torch.where(place < ahead_B[:, None], (first_B[:, None] + place) % slots, source)
        return cls(real, ahead_B + count_B, first_B, source, target_BT)

    @classmethod
    def _continued(cls, state: StudentState, rule: Rule) -> Rows:
        """For rows without padding that have seen the same number of tokens."""
        seen = state.positions()[0]
        first = min(seen, int(rule.near_start(torch.tensor(seen - 1))))
        slots: tuple[slice, ...] = ()
        if first < seen:
            start, stop = first % rule.slots, (seen - 1) % rule.slots + 1
            slots = (slice(start, stop),) if start < stop else (slice(start, rule.slots), slice(0, stop))
        return cls(None, None, torch.full_like(state.seen_B, first), None, None, slots)

    @property
    def ahead(self) -> int:
        """Buffered keys of `slots`."""
        return sum(part.stop - part.start for part in self.slots or ())

    def align(self, new: Tensor, before: Tensor | None = None) -> Tensor:
        """[B, heads, T, dim] (after `before` [B, heads, N, dim]) -> [B, heads, L, dim]."""
        if self.slots and before is not None:
            return torch.cat([*(before[:, :, part].to(new.dtype) for part in self.slots), new], 2)
        if self.source_BL is None:
            return new
        both = new if before is None else torch.cat([before.to(new.dtype), new], 2)
        index = self.source_BL[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3])
        return both.gather(2, index)

    def restore(self, aligned: Tensor) -> Tensor:
        """[B, heads, L, dim] -> [B, heads, T, dim], zero at tokens that are not real."""
        if self.target_BT is not None:
            index = self.target_BT.clamp_min(0)[:, None, :, None].expand(-1, aligned.shape[1], -1, aligned.shape[3])
            aligned = aligned.gather(2, index)
        elif self.slots:
            aligned = aligned[:, :, self.ahead :]
        return aligned if self.real_BT is None else aligned.masked_fill(~self.real_BT[:, None, :, None], 0.0)

    def positions(self, length: int) -> Tensor:
        """Position of every aligned token, [B, L]."""
        return self.first_B[:, None] + torch.arange(length, device=self.first_B.device)


def far_keys(fk_BKLF: Tensor, rows: Rows, rule: Rule) -> Tensor:
    """Key features, zero at sinks, which never become far. (Padding comes after every query that could see it.)"""
    if not rule.sinks:
        return fk_BKLF
    sink = rows.positions(fk_BKLF.shape[2]).to(fk_BKLF.device) < rule.sinks
    return fk_BKLF.masked_fill(sink[:, None, :, None], 0.0)


def sink_pairs(
    k_BGLD: Tensor, v_BGLE: Tensor, rows: Rows, rule: Rule, state: StudentState | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of positions 0..S-1, [B, G, S, dim]; entries no query can see yet are arbitrary but finite."""
    sink = torch.arange(rule.sinks, device=k_BGLD.device)
    place = (sink - rows.first_B[:, None].to(sink.device)).clamp(0, k_BGLD.shape[2] - 1)
    k, v = (x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k_BGLD, v_BGLE))
    if state is None:
        return k, v
    known = (sink < state.seen_B[:, None])[:, None, :, None]
    return torch.where(known, state.sink_k_BGSD.to(k.dtype), k), torch.where(known, state.sink_v_BGSE.to(v.dtype), v)


def first_tokens(x_BGTD: Tensor, rule: Rule) -> Tensor | None:
    """The first S tokens of rows without a state (zeros where a row is shorter; no query sees those), or None."""
    if not rule.sinks:
        return None
    return torch.nn.functional.pad(x_BGTD[:, :, : rule.sinks], (0, 0, 0, max(0, rule.sinks - x_BGTD.shape[2])))


@torch.no_grad()
def state_after(
    k_BGLD: Tensor,
    v_BGLE: Tensor,
    fk_BKLF: Tensor | None,
    rows: Rows,
    rule: Rule,
    state: StudentState,
) -> StudentState:
    """The state after the aligned rows, with features from :func:`far_keys`; `state` itself is not modified."""
    length = k_BGLD.shape[2]
    batch = k_BGLD.shape[0]
    device = k_BGLD.device
    total = torch.full((batch,), length, device=device) if rows.length_B is None else rows.length_B
    seen_B = rows.first_B.to(device) + total
    position_BL = rows.positions(length).to(device)
    far_s, far_z = state.far_s_BKFE.clone(), state.far_z_BKF.clone()
    if rule.far and fk_BKLF is not None:
        far_from = seen_B if rule.kind == "linear" else torch.minimum(rule.near_start(seen_B - 1), seen_B)
        old = (position_BL < far_from[:, None])[:, None, :, None]
        add_far(far_s, far_z, fk_BKLF.masked_fill(~old, 0.0), v_BGLE, seen_B)
    after = state.clone()
    after.far_s_BKFE, after.far_z_BKF, after.seen_B = far_s, far_z, seen_B.to(state.seen_B.device)
    if rule.slots:
        _fill_buffer(after, k_BGLD, v_BGLE, rows)
    if rule.sinks:
        sink_k, sink_v = sink_pairs(k_BGLD, v_BGLE, rows, rule, state)
        known = (torch.arange(rule.sinks, device=device) < seen_B[:, None])[:, None, :, None]
        after.sink_k_BGSD = torch.where(known, sink_k, 0.0).to(state.sink_k_BGSD.dtype)
        after.sink_v_BGSE = torch.where(known, sink_v, 0.0).to(state.sink_v_BGSE.dtype)
    return after


def _fill_buffer(after: StudentState, k_BGLD: Tensor, v_BGLE: Tensor, rows: Rows) -> None:
    """Write to every slot the newest pair that maps to it; slots without one keep their content."""
    for name, x in (("k_BGND", k_BGLD), ("v_BGNE", v_BGLE)):
        setattr(after, name, newest(getattr(after, name), x, after, rows))


def newest(old_BXN: Tensor, aligned_BXL: Tensor, after: StudentState, rows: Rows) -> Tensor:
    """A buffer [B, heads, N, dim] of `after` with what the aligned tokens [B, heads, L, dim] put into its slots."""
    if rows.slots is not None:
        return _newest_of_continued(old_BXN, aligned_BXL, rows)
    held_BN = after.slot_positions()
    place = held_BN - rows.first_B[:, None].to(held_BN.device)
    index = place.clamp(0, aligned_BXL.shape[2] - 1)[:, None, :, None]
    new = aligned_BXL.gather(2, index.expand(-1, old_BXN.shape[1], -1, old_BXN.shape[3])).to(old_BXN.dtype)
    return torch.where((place >= 0)[:, None, :, None], new, old_BXN)


def _newest_of_continued(old_BXN: Tensor, aligned_BXL: Tensor, rows: Rows) -> Tensor:
    """:func:`newest` of rows that continue from one position, by copies of neighbouring tokens."""
    new, slots, length = old_BXN.clone(), old_BXN.shape[2], aligned_BXL.shape[2]
    first, at = int(rows.first_B[0]), max(0, length - slots)
    while at < length:
        slot = (first + at) % slots
        count = min(length - at, slots - slot)
        new[:, :, slot : slot + count] = aligned_BXL[:, :, at : at + count]
        at += count
    return new
