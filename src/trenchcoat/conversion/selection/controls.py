"""Selections that measure nothing, to compare with: groups spread evenly over the model, and groups at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from trenchcoat.conversion.selection.probe import Probe
from trenchcoat.evaluation.selection import LayerScores
from trenchcoat.models.families import attention_sites


def uniform(probe: Probe) -> dict[str, LayerScores]:
    """Evenly spread over the layers and groups, whatever the number that is chosen."""
    total = sum(site.num_kv_heads for site in probe.sites)
    return {"order": _scores(probe, spread_order(total))}


def random_order(probe: Probe) -> dict[str, LayerScores]:
    """A random order, from the seed of the run."""
    order = list(range(sum(site.num_kv_heads for site in probe.sites)))
    random.Random(probe.seed).shuffle(order)
    return {"order": _scores(probe, order)}


def spread_order(total: int) -> list[int]:
    """0 to total - 1 in an order whose beginnings are all evenly spread (van der Corput, 1935): the middle, the
    quarters, the eighths, ..."""
    bits = max(1, (total - 1).bit_length())
    reversed_bits = [int(f"{i:0{bits}b}"[::-1], 2) for i in [*range(1, 1 << bits), 0]]
    return list(dict.fromkeys(place * total >> bits for place in reversed_bits))


def _scores(probe: Probe, order: Sequence[int]) -> LayerScores:
    """Scores that give this order of the groups of ``probe.sites``, numbered one layer after another."""
    score = {place: float(len(order) - rank) for rank, place in enumerate(order)}
    groups = {site.index: site.num_kv_heads for site in probe.sites}
    places = iter(range(len(order)))
    return [[score[next(places)] for _ in range(groups.get(s.index, 0))] for s in attention_sites(probe.model)]
