"""Retrieval: how much a head looks, in the second half of a text that follows itself, at what came next the first time.

Forward only, layer by layer and in blocks of queries: :func:`followers_mass` needs nothing but one layer's queries and
keys, so it also works where no backward pass fits. Related: induction heads (https://arxiv.org/abs/2209.11895).

Shapes: b rows, T tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trenchcoat.conversion.selection.probe import Probe
from trenchcoat.evaluation.selection import LayerScores
from trenchcoat.models.interface import LazyMask, Output, own_attention
from trenchcoat.models.softmax_rows import softmax_rows
from trenchcoat.models.transformers_internals import score_options
from trenchcoat.runtime import distributed


def followers_mass(
    q_bHTD: Tensor, k_bGTD: Tensor, seen: Callable[[int, int], Tensor], *, scale: float, **scores: Any
) -> Tensor:
    """Attention weight on position n - T/2 + 1, averaged over the queries n >= T/2 (but the last) and rows: [H].

    ``seen``, ``scale`` and ``scores`` (soft-cap, sink logit) as in :func:`softmax_rows`.
    """
    rows, heads, tokens, _ = q_bHTD.shape
    half = tokens // 2
    total_H = torch.zeros(heads, dtype=torch.float64, device=q_bHTD.device)
    for start, stop, weight_bHnt in softmax_rows(q_bHTD, k_bGTD, seen, scale=scale, first=half, **scores):
        query = torch.arange(start, min(stop, tokens - 1), device=q_bHTD.device)
        total_H += weight_bHnt[:, :, query - start, query - half + 1].sum((0, 2)).double()
    return total_H / (rows * max(1, tokens - half - 1))


class MassObserver:
    """An attention function for :func:`attention_through`: the model's own, and each layer's mass is added up."""

    def __init__(self) -> None:
        self.heads: dict[int, Tensor] = {}

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, **kwargs: Any) -> Output:
        """The model's own output."""
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)

        def seen(start: int, stop: int) -> Tensor:
            """Which keys those queries see."""
            return mask.block(start, stop).to(query.device)

        found = followers_mass(query, key, seen, scale=scale, **score_options(kwargs)).cpu()
        self.heads[module.layer_idx] = self.heads.get(module.layer_idx, torch.zeros_like(found)) + found
        return own_attention(module, query, key, value, mask, **kwargs)


def retrieval(probe: Probe) -> dict[str, LayerScores]:
    """``copy``: each head's attention to what followed the same token in the first half, summed over a group."""
    observer = MassObserver()
    probe.observe(observer, probe.copy_NT)
    none = torch.zeros(0, dtype=torch.float64)
    heads = [observer.heads.get(site.index, none.new_zeros(site.num_heads)) for site in probe.sites]
    return {"copy": probe.by_layer(distributed.sum_tensor(torch.cat([none, *heads])) / len(probe.copy_NT))}
