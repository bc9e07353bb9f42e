"""Gates: each query head's output is a full + (1 - a) near, and the loss says how much it wants a.

``near`` is softmax attention over the window and the sinks, ``full`` the model's own attention, both exact: a = 1 for
all heads is the model, a = 0 is window + sinks without training. The gradient of the loss with respect to each a,
averaged over several values of a common to all heads, says what the head's view of far text is worth. The model is
frozen; only the gates get gradients, through layers that are recomputed in the backward pass, sharded or not.
Related: DuoAttention (https://arxiv.org/abs/2410.10819), which trains such gates.

Shapes: b rows, T tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trenchcoat.config import StudentConfig, UserError
from trenchcoat.conversion.selection.probe import Probe
from trenchcoat.evaluation.selection import LayerScores
from trenchcoat.models.attach import attention_through
from trenchcoat.models.families import AttentionSite, decoder_of
from trenchcoat.models.interface import Output, own_attention
from trenchcoat.models.transformers_internals import score_options
from trenchcoat.runtime import distributed
from trenchcoat.runtime.head import VocabularyHead, run_to_head
from trenchcoat.runtime.sharding import compute_device
from trenchcoat.students import build_student
from trenchcoat.training.logits import LogitLoss, Taught, own_teacher


class Gated:
    """An attention function for :func:`attention_through`; rows of text must be without padding.

    ``gates``: layer -> a per query head [H]; a layer without an entry runs its own attention.
    """

    def __init__(self, sites: list[AttentionSite], near: StudentConfig, gates: Mapping[int, Tensor]) -> None:
        self.gates = gates
        self._near = {
            site.index: build_student(
                near, num_heads=site.num_heads, num_kv_heads=site.num_kv_heads, head_dim=site.head_dim
            )
            for site in sites
            if site.index in gates
        }

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Output:
        """q [b, H, T, D], k and v [b, G, T, D] -> (y [b, T, H, D], None)."""
        gate_H = self.gates.get(module.layer_idx)
        if gate_H is None:
            return own_attention(module, query, key, value, mask, **kwargs)
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        near_bHTD, _ = self._near[module.layer_idx](query, key, value, scale=scale, **score_options(kwargs))
        near_bTHD = near_bHTD.transpose(1, 2)
        if not gate_H.requires_grad and not gate_H.any():
            return near_bTHD, None
        full_bTHD = own_attention(module, query, key, value, mask, **kwargs)[0]
        gate_H1 = gate_H.to(full_bTHD.device)[:, None]
        mixed = near_bTHD.float() + gate_H1 * (full_bTHD.float() - near_bTHD.float())
        return mixed.to(full_bTHD.dtype), None


def gate_gradients(probe: Probe) -> dict[str, LayerScores]:
    """``text``: - d loss past 2W / d a; ``copy``: the same for the second half of a text that follows itself."""
    if compute_device(probe.model).type == "meta":
        raise UserError(
            "select.method=gates needs the whole model in memory: run `trenchcoat select` first, where it fits (also "
            "sharded, under torchrun; the blocks then read selection.json), or set select.method=retrieval, which goes "
            "through the model block by block"
        )
    start = {"text": 2 * probe.near.window, "copy": probe.copy_NT.shape[1] // 2}
    batches = {part: _batches(probe, rows_NT, start[part]) for part, rows_NT in probe.rows.items()}
    work = [(part, i, gate) for part in batches for gate in probe.cfg.gates for i in range(len(batches[part]))]
    total = {part: torch.zeros(sum(site.num_heads for site in probe.sites), dtype=torch.float64) for part in batches}
    with probe.log.progress("gates", len(work)) as display, _recomputing(probe.model):
        taught = {part: [_taught(probe, batch) for batch in rows] for part, rows in batches.items()}
        for done, item in enumerate(distributed.share(work), 1):
            part, i, gate = item or work[0]  # None: only takes part in collectives
            found = _gradient(probe, batches[part][i], taught[part][i], gate)
            if item is not None:
                total[part] -= found / (len(batches[part]) * len(probe.cfg.gates))
            display.update(min(done * distributed.size(), len(work)))
    return {part: probe.by_layer(distributed.sum_tensor(heads)) for part, heads in total.items()}


def _batches(probe: Probe, rows_NT: Tensor, first: int) -> list[dict[str, Tensor]]:
    """A micro-batch of each row; the loss is that of the predictions made at position ``first`` and later."""
    place_T, device = torch.arange(rows_NT.shape[1]), compute_device(probe.model)
    counted_1T = (place_T >= first)[None].to(device)
    found = []
    for row_T in rows_NT:
        labels_T = torch.where(place_T > first, row_T, -100)
        found.append({"input_ids": row_T[None].to(device), "labels": labels_T[None].to(device), "counted": counted_1T})
    return found


def _taught(probe: Probe, batch: dict[str, Tensor]) -> Taught | None:
    """What the model itself says about a row; None where it is not asked."""
    if probe.cfg.loss == "ce":
        return None
    return own_teacher(lambda model: nullcontext())(probe.model, {"input_ids": batch["input_ids"]})


def _gradient(probe: Probe, batch: dict[str, Tensor], taught: Taught | None, gate: float) -> Tensor:
    """d loss / d a of every head of ``probe.sites`` [sum of H], where all gates are ``gate``; float64 on the host."""
    device, sites = batch["input_ids"].device, probe.sites
    gates = {s.index: torch.full((s.num_heads,), gate, device=device, requires_grad=True) for s in sites}
    counted = {"labels": batch["labels"], "attention_mask": batch["counted"]}
    loss = LogitLoss.of(counted, 0.0 if taught is None else 1.0, taught)
    with torch.enable_grad(), attention_through(probe.model, Gated(sites, probe.near, gates)):
        hidden_1Td, more = run_to_head(probe.model, input_ids=batch["input_ids"], use_cache=False)
        slope_1Td = loss.over(VocabularyHead(probe.model), hidden_1Td)
        torch.autograd.backward([hidden_1Td, *more], [slope_1Td, *(torch.zeros_like(t) for t in more)])
    return torch.cat([gates[site.index].grad.double().cpu() for site in sites])  # type: ignore[union-attr]


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """The model frozen and in evaluation mode; its layers keep only their inputs for the backward pass."""
    model.eval().requires_grad_(False)
    layers: list[Any] = list(decoder_of(model).layers)
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
