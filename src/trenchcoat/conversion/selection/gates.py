"""Gates: each query head's output is a full + (1 - a) near, and the loss says how much it wants a.

``near`` is softmax attention over the window and the sinks, ``full`` the model's own attention, both exact: a = 1 for
all heads is the model, a = 0 is window + sinks without training. The gradient of the loss with respect to each a,
averaged over several values of a common to all heads, says what the head's view of far text is worth. The model is
frozen; only the gates get gradients, through layers that are recomputed in the backward pass, sharded or not.
Related: DuoAttention (https://arxiv.org/abs/2410.10819), which trains such gates.

Shapes: b rows, T tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
from trenchcoat.runtime.sharding import compute_device
from trenchcoat.students import build_student


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
    rows = {"text": probe.text_NT, "copy": probe.copy_NT}
    work = [(part, i, gate) for part in rows for gate in probe.cfg.gates for i in range(len(rows[part]))]
    total = {part: torch.zeros(sum(site.num_heads for site in probe.sites), dtype=torch.float64) for part in rows}
    with probe.log.progress("gates", len(work)) as display, _recomputing(probe.model):
        for done, item in enumerate(distributed.share(work), 1):
            part, i, gate = item or work[0]  # None: only takes part in collectives
            found = _gradient(probe, rows[part][i : i + 1], start[part], gate)
            if item is not None:
                total[part] -= found / (len(rows[part]) * len(probe.cfg.gates))
            display.update(min(done * distributed.size(), len(work)))
    return {part: probe.by_layer(distributed.sum_tensor(heads)) for part, heads in total.items()}


def _gradient(probe: Probe, ids_1T: Tensor, first: int, gate: float) -> Tensor:
    """d loss / d a of every head of ``probe.sites`` [sum of H], where all gates are ``gate``; float64 on the host.

    The loss is the mean over tokens predicted from position ``first`` on.
    """
    device = compute_device(probe.model)
    ids_1T = ids_1T.to(device)
    sites = probe.sites
    gates = {s.index: torch.full((s.num_heads,), gate, device=device, requires_grad=True) for s in sites}
    count = ids_1T.shape[1] - first
    keep = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(probe.model.forward).parameters else {}
    with torch.enable_grad(), attention_through(probe.model, Gated(sites, probe.near, gates)):
        logits = probe.model(input_ids=ids_1T, use_cache=False, **keep).logits
        F.cross_entropy(logits[0, -count:-1].float(), ids_1T[0, first + 1 :]).backward()
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
