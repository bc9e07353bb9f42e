"""What a method of selection gets: the model, the student of the groups that are not kept, and rows of text.

Shapes: N rows, T tokens (even), each row full of real tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from trenchcoat.config import StudentConfig
from trenchcoat.config.settings import SelectConfig
from trenchcoat.conversion.selection.registry import METHODS
from trenchcoat.data.batches import Batch, Batches
from trenchcoat.evaluation.selection import LayerScores
from trenchcoat.models.attach import attention_through
from trenchcoat.models.families import AttentionSite, attention_sites
from trenchcoat.models.interface import Output, own_attention
from trenchcoat.runtime import distributed
from trenchcoat.runtime.runlog import RunLog
from trenchcoat.runtime.sharding import compute_device, run_decoder

AttentionFunction = Callable[..., Output]
Observe = Callable[[AttentionFunction, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A model without students, and the text that it is measured on."""

    model: Any
    """On the meta device where it is only ever in memory block by block; a method can then only ``observe``."""
    observe: Observe
    """Runs this process's share of rows of ids [N, T] through the model, without gradients; every layer calls the
    function as its attention (see :func:`trenchcoat.models.attach.attention_through`). A collective."""
    near: StudentConfig
    """Window + sinks: what a group that is not kept sees."""
    whole: Collection[int]
    """Layers that keep softmax attention in any case; they have no scores."""
    text_NT: Tensor
    copy_NT: Tensor
    """The second half of each row repeats its first half."""
    cfg: SelectConfig
    seed: int
    log: RunLog

    @property
    def sites(self) -> list[AttentionSite]:
        """The layers that can be chosen from."""
        return [site for site in attention_sites(self.model) if site.index not in self.whole]

    @property
    def rows(self) -> dict[str, Tensor]:
        """The rows of each part [N, T]."""
        return {"text": self.text_NT, "copy": self.copy_NT}

    def by_layer(self, heads: Tensor) -> LayerScores:
        """Numbers per query head (those of ``sites``, one layer after another), summed over each group's heads."""
        found: dict[int, list[float]] = {}
        parts = heads.double().cpu().split([site.num_heads for site in self.sites])
        for site, part_H in zip(self.sites, parts, strict=True):
            found[site.index] = part_H.reshape(site.num_kv_heads, -1).sum(1).tolist()
        return [found.get(site.index, []) for site in attention_sites(self.model)]


Method = Callable[[Probe], dict[str, LayerScores]]
"""A method of selection."""


def method_named(name: str) -> Method:
    """The method registered as ``name``."""
    module, _, function = METHODS[name].partition(":")
    found: Method = getattr(importlib.import_module(module), function)
    return found


def observer_of(model: Any) -> Observe:
    """``Probe.observe`` for a model that is in memory, sharded or not."""

    def observe(function: AttentionFunction, ids_NT: Tensor) -> None:
        """One row at a time."""
        model.eval()
        for i in distributed.share(range(len(ids_NT))):
            called = own_attention if i is None else function  # None: only takes part in collectives
            with torch.no_grad(), attention_through(model, called):
                run_decoder(model, input_ids=ids_NT[i or 0][None].to(compute_device(model)), use_cache=False)

    return observe


def training_rows(batches: Batches, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows of training text, and other rows of it, each [rows, length]."""
    found = full_rows((batches.train_batch(i) for i in count()), 2 * rows, length)
    return found[:rows], found[rows:]


def full_rows(batches: Iterator[Batch], rows: int, length: int) -> Tensor:
    """[rows, length] ids: the real tokens of ``batches``, one after another, cut into full rows."""
    found: list[Tensor] = []
    missing = rows * length
    while missing > 0:
        batch = next(batches)
        mask = batch.get("attention_mask")
        ids = batch["input_ids"].flatten() if mask is None else batch["input_ids"][mask.bool()]
        found.append(ids)
        missing -= len(ids)
    return torch.cat(found)[: rows * length].reshape(rows, length)


def copied(rows_NT: Tensor) -> Tensor:
    """Each row's first half, followed by itself."""
    half = rows_NT[:, : rows_NT.shape[1] // 2]
    return torch.cat([half, half], dim=1)
