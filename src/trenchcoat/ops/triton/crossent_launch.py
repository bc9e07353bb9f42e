"""Launches of :mod:`trenchcoat.ops.triton.crossent`: tile sizes, unsupported calls, the passes.

Shape legend: B rows, H query heads, G key/value heads, K key maps, T tokens, D key dim, P columns of a map, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trenchcoat.ops.crossent import NEEDS_FAR, SMALLEST
from trenchcoat.ops.state import FusedMap, FusedMaps, HeadWeights, Rule, Tokens
from trenchcoat.ops.triton.crossent import key_side, query_side
from trenchcoat.ops.triton.features import stored_features
from trenchcoat.ops.triton.launch import (
    INTERPRETED,
    Call,
    Spans,
    accepted,
    inner,
    launch_kernel,
    refused,
    shared_limit,
)
from trenchcoat.ops.triton.parts import Constants, features_of
from trenchcoat.ops.triton.passes import map_gradient, total
from trenchcoat.ops.triton.tiles import Tile

FEATURE_TILE = 64
"""Tokens of a tile of `stored_features` when no sums are needed."""
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Tokens of the tile that stays on chip (a multiple of the other) and of the streamed tiles, warps, stages."""

    resident: int
    streamed: int
    warps: int
    stages: int

    def shared_bytes(self, c: Constants, itemsize: int) -> int:
        """Shared memory of a program, accurate to 2 KiB: a resident tile and a streamed one per stage; at the end, the
        resident queries or keys and their map (or the parts of both that are read at a time)."""
        d, p = c.block_d.value, c.block_p.value
        loop = (self.resident + self.stages * self.streamed) * (d + features_of(c))
        end = self.resident * d + (c.piece.value or d) * p * (2 if c.split.value else 1)
        return int(itemsize * max(loop, end)) + 2048

    def registers(self, c: Constants) -> int:
        """Registers per thread for float32 tiles: gradients of features, and four of scores or weights."""
        return self.resident * (features_of(c) + 4 * self.streamed) // (32 * self.warps)


CHOICES = (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 1), Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 1), Tiles(16, 16, 4, 1))
"""In order of preference; the first three use tensor cores."""
MOST_REGISTERS = 192


def tiles_of(c: Constants, itemsize: int, available: int) -> Tiles | None:
    """The first choice that fits into registers and `available` bytes of shared memory, or None."""
    for tiles in CHOICES[-1:] if INTERPRETED else CHOICES if itemsize == 2 else CHOICES[3:]:
        if tiles.registers(c) <= MOST_REGISTERS and tiles.shared_bytes(c, itemsize) <= available:
            return tiles
    return None


def cross_entropy(
    tokens: Tokens,
    maps: FusedMaps | None,
    heads: HeadWeights,
    rule: Rule,
    *,
    length_B: Tensor | None = None,
    teacher_window: int | None = None,
    learn: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """(summed cross-entropy of the attention rows, its gradients), float32; see
    :func:`trenchcoat.ops.crossent.attention_cross_entropy`.

    The gradients: query matrix, query bias, key matrix, key bias, log(g / l); all None without `learn`. q and k are
    bfloat16, float16 or float32; rows must have no padding between tokens, `length_B` int64 is their token count (None:
    all T).

    Raises:
        ValueError: the kernels do not support the call.
    """
    if not rule.far or maps is None:
        raise ValueError(NEEDS_FAR)
    query, key = maps
    q, k = inner(tokens.q_BHTD.detach()), inner(tokens.k_BGTD.detach())
    spans = Spans.of_lengths(length_B, q.device)
    logit = None if heads.sink_logit_H is None else heads.sink_logit_H.detach().to(q.device, torch.float32).contiguous()
    log_ratio = rule.log_ratio(heads.mix_H.detach()).float().contiguous()
    call = Call(rule, q, k, k, query, key, log_ratio * LOG2E, logit, spans=spans)
    tiles = _tiles(call)
    fq, _none = _store(call, q, query, None)
    fk, sums = _store(call, k, key, tiles.streamed)
    return _run(call, tiles, (fq, fk), log_ratio, sums, teacher_window, learn)


def _tiles(call: Call) -> Tiles:
    accepted(replace(call, rule=replace(call.rule, far=False)))
    there = shared_limit(call.q.device)
    tiles = tiles_of(call.constants, call.q.element_size(), there)
    if tiles is None:
        sizes = f"head dim {call.q.shape[3]} and {call.query.features if call.query else 0} features"
        raise refused(f"no tile of {sizes} fits into the {there} bytes of shared memory; use a smaller feature_dim")
    return tiles


def _store(call: Call, x: Tensor, phi: FusedMap, tile: int | None) -> tuple[Tensor, Tensor | None]:
    """phi(x) [B, M, T, F]; with `tile` also its running totals before each tile, [B M, tiles, F]."""
    batch, inputs, tokens, _ = x.shape
    maps, size = phi.matrix.shape[0], tile or FEATURE_TILE
    count = -(-tokens // size)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    out = x.new_empty(batch, maps, tokens, phi.features, dtype=dtype)
    sums = None if tile is None else x.new_empty(batch * maps, count, phi.features, dtype=torch.float32)
    launch_kernel(
        stored_features, (batch * maps * count,), call,
        call.tensor(x), call.operands(phi), call.tensor(out), sums, call.place(), inputs, maps, count,
        SIZE=size, usual=Tile(4, 1),
    )  # fmt: skip
    if sums is not None:
        total(sums, None)
    return out, sums


def _run(
    call: Call, tiles: Tiles, features: tuple[Tensor, Tensor], log_ratio_H: Tensor, key_sums: Tensor | None,
    teacher_window: int | None, learn: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """The cross-entropy from stored features phi(q) [B, H, T, F] and phi(k) [B, K, T, F]."""
    batch, heads, tokens, _ = call.q.shape
    count, key_count = (-(-tokens // size) for size in (tiles.resident, tiles.streamed))
    query, key, x = call.query, call.key, call.tensor
    assert query is not None
    assert key is not None
    loss = torch.empty(2, batch * heads, count, device=call.q.device, dtype=torch.float32)
    sums, du = None, None
    if learn:
        sums = loss.new_empty(batch * heads, count, query.features)
        du = features[0].new_empty(batch, heads, tokens, query.matrix.shape[2])
    row = tuple(x(loss.new_empty(batch, heads, tokens) if learn else None) for _ in range(2))
    grid, inputs = (batch * heads * count,), [x(t) for t in (call.q, call.k, *features)]
    counts, numbers = (heads, call.kv_heads, call.maps, count), (*call.numbers(), teacher_window or 0)
    flags: dict[str, Any] = {
        "RESIDENT": tiles.resident, "STREAMED": tiles.streamed, "WINDOWED": teacher_window is not None,
        "TINY": query.floor * query.floor * query.features < 2 * SMALLEST, "usual": Tile(tiles.warps, tiles.stages),
    }  # fmt: skip
    launch_kernel(
        query_side, grid, call,
        *inputs, call.operands(query), key_sums, row, tuple(loss), sums, x(du), log_ratio_H, call.logit, call.place(),
        *counts, key_count, *numbers, LEARN=learn, **flags,
    )  # fmt: skip
    if du is None or sums is None:
        return loss[0].sum(), [None] * 5
    gradients = map_gradient(call, call.q, du, heads)
    total(sums, None, backwards=True)
    launch_kernel(
        key_side, grid, call,
        *inputs, call.operands(key), sums, row, x(du), call.place(), *counts, *numbers, **flags,
    )  # fmt: skip
    gradients += map_gradient(call, call.k, du, call.maps)
    return loss[0].sum(), [*gradients, loss[1].view(batch, heads, count).sum((0, 2))]
