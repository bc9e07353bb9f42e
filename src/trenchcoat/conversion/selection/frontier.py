"""What keeping some groups closes without any training: the others see the window and the sinks.

The kept groups run the model's own attention, which is the gate of :mod:`.gates` at 0 or 1, so every share of the
cache is scored on the model as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from trenchcoat.conversion.selection.gates import Gated
from trenchcoat.conversion.selection.probe import Probe
from trenchcoat.evaluation.scoring import EvalRows, score
from trenchcoat.evaluation.selection import FrontierPoint
from trenchcoat.evaluation.statistics import Estimate, RowSums, gap_closed, paired_difference
from trenchcoat.models.attach import attention_through
from trenchcoat.models.families import attention_sites

Losses = dict[str, RowSums]
"""Loss of each row: ``text``, past 2W; ``copy``, on the second half."""


@dataclass
class Frontier:
    """Scores any choice of groups on the held-out rows of a probe; every choice is scored once."""

    probe: Probe
    batch_size: int
    _known: dict[frozenset[str], Losses] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Groups of the model."""
        return sum(site.num_kv_heads for site in attention_sites(self.probe.model))

    def losses(self, kept: Collection[str]) -> Losses:
        """Losses with the groups ``kept`` ("layer.group") and the layers that keep softmax in any case."""
        key = frozenset(kept)
        if key not in self._known:
            self._known[key] = self._score(key)
        return self._known[key]

    def _score(self, kept: frozenset[str]) -> Losses:
        probe, window = self.probe, self.probe.near.window
        gates = {}
        for site in probe.sites:
            own_G = torch.tensor([float(f"{site.index}.{group}" in kept) for group in range(site.num_kv_heads)])
            if not own_G.all():
                gates[site.index] = own_G.repeat_interleave(site.num_heads // site.num_kv_heads)
        half = probe.copy_NT.shape[1] // 2
        text, copy = _rows(probe.text_NT, 1), _rows(probe.copy_NT, half + 1)
        with attention_through(probe.model, Gated(probe.sites, probe.near, gates)):
            return {
                "text": score(probe.model, text, window=window, batch_size=self.batch_size).far,
                "copy": score(probe.model, copy, window=window, batch_size=self.batch_size).all,
            }

    def everything(self) -> Losses:
        """Losses of the model itself."""
        sites = self.probe.sites
        return self.losses([f"{site.index}.{group}" for site in sites for group in range(site.num_kv_heads)])

    def gaps(self) -> dict[str, Estimate]:
        """Loss of window + sinks above the model's own, in nats a token."""
        nothing, everything = self.losses(()), self.everything()
        return {part: paired_difference(nothing[part], everything[part]) for part in everything}

    def point(self, method: str, kept: Sequence[str]) -> FrontierPoint:
        """The shares of the two gaps that a choice closes."""
        found, nothing, everything = self.losses(kept), self.losses(()), self.everything()
        text, copy = (gap_closed(found[part], nothing[part], everything[part]) for part in ("text", "copy"))
        return FrontierPoint(
            method=method, groups=len(kept), share=len(kept) / self.total,
            text=_value(text), text_error=_error(text), copy=_value(copy), copy_error=_error(copy),
        )  # fmt: skip


def _rows(ids: torch.Tensor, first: int) -> EvalRows:
    """Rows of which the tokens from position ``first`` on are scored."""
    real = torch.ones_like(ids, dtype=torch.bool)
    return EvalRows(ids, real, real & (torch.arange(ids.shape[1]) >= first))


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else round(estimate.value, 5)


def _error(estimate: Estimate | None) -> float | None:
    return None if estimate is None or estimate.error != estimate.error else round(estimate.error, 5)
