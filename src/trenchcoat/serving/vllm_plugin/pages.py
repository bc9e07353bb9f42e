"""A request's state as one page of a server's cache, and attention of many requests' tokens over such pages.

A page is what :class:`trenchcoat.ops.RowState` holds for one row: a few tensors of fixed shapes. The tokens of a
step are concatenated: first those of requests that decode (one token each), then those of requests that prefill.

Shape legend: P pages, T tokens of a step, R requests of it, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trenchcoat.students import RowState, StudentAttention

_SEEN = "seen_B"


@dataclass(frozen=True)
class PageLayout:
    """The tensors of a page, widest dtypes first, so that each is aligned to its element size."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Without the page axis; empty tensors (no sinks, no buffer) are left out."""
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, student: StudentAttention, dtype: torch.dtype) -> PageLayout:
        """For a student in a model of `dtype`: far sums float32, tokens seen int32, keys and values `dtype`."""
        state = student.empty_state(1, dtype=dtype, device="meta").tensors()
        kept = [(name, t) for name, t in state.items() if t.numel()]
        kept.sort(key=lambda item: (item[0] != _SEEN, -item[1].element_size()))
        return cls(
            names=tuple(name for name, _ in kept),
            shapes=tuple(tuple(t.shape[1:]) or (1,) for _, t in kept),
            dtypes=tuple(torch.int32 if name == _SEEN else t.dtype for name, t in kept),
        )

    def read(self, pages: Sequence[Tensor], slots: Tensor, student: StudentAttention, dtype: torch.dtype) -> RowState:
        """The states in `slots` (int [R]); copies."""
        state = student.empty_state(slots.shape[0], dtype=dtype, device=slots.device)
        for name, page in zip(self.names, pages, strict=True):
            tensor = state.tensors()[name]
            tensor.copy_(page[slots.long()].view(tensor.shape))
        return state

    def write(self, pages: Sequence[Tensor], slots: Tensor, state: RowState) -> None:
        """Write `state` to `slots`."""
        for name, page in zip(self.names, pages, strict=True):
            page[slots.long()] = state.tensors()[name].view(-1, *page.shape[1:]).to(page.dtype)


@dataclass(frozen=True)
class StepRequests:
    """The requests of a step; the first ``decodes`` of them have one token each."""

    starts: Sequence[int]
    """Start of each request's tokens, and the end of the last; R + 1 numbers."""
    lengths: Sequence[int]
    """Tokens of each request so far, including this step's."""
    slots: Tensor
    """Page of each request, int [R]. A page's content before a request's first token is ignored."""
    decodes: int


def attend_pages(
    student: StudentAttention,
    layout: PageLayout,
    pages: Sequence[Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    requests: StepRequests,
    *,
    scale: float,
) -> Tensor:
    """y [T, H * D] of a step's tokens, after RoPE; the requests' pages are updated.

    ``qkv`` are q [T, H * D], k [T, G * D] and v [T, G * D].
    """
    q_TX, k_TX, v_TX = qkv
    dim, kv_heads = student.head_dim, student.num_kv_heads
    q, k, v = (x.unflatten(-1, (heads, dim)) for x, heads in ((q_TX, -1), (k_TX, kv_heads), (v_TX, kv_heads)))
    y_TX = torch.empty_like(q_TX)
    slots, lengths, decodes = requests.slots, requests.lengths, requests.decodes
    if decodes:
        state = layout.read(pages, slots[:decodes], student, q_TX.dtype)
        first = torch.tensor([length == 1 for length in lengths[:decodes]], device=slots.device)
        for tensor in state.tensors().values():
            tensor[first] = 0
        now = (x[:decodes, :, None] for x in (q, k, v))
        y_TX[:decodes] = student.decode(*now, state=state, scale=scale).flatten(1)
        layout.write(pages, slots[:decodes], state)
    for request in range(decodes, len(lengths)):
        begin, end = requests.starts[request], requests.starts[request + 1]
        slot, before = slots[request : request + 1], lengths[request] - (end - begin)
        if before:
            known = layout.read(pages, slot, student, q_TX.dtype)
        else:
            known = student.empty_state(1, dtype=q_TX.dtype, device=q_TX.device)
        row = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        y, after = student(*row, scale=scale, state=known)
        y_TX[begin:end] = y[0].transpose(0, 1).flatten(1)
        layout.write(pages, slot, after)
    return y_TX


def heads_of_rank(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """The heads (first axis) of one of `ranks` processes; with fewer heads than processes, neighbours share one."""
    heads = whole.shape[0]
    if heads >= ranks:
        return whole.narrow(0, rank * (heads // ranks), heads // ranks)
    return whole.narrow(0, rank // (ranks // heads), 1)
