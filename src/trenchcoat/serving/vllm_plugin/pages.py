"""A request's state as one page of a server's cache, and attention of many requests' tokens over such pages.

A page is what :class:`trenchcoat.ops.RowState` holds for one row: a few tensors of fixed shapes, one after the other.
The tokens of a step are concatenated: first those of requests that decode (one token each), then those of requests that
prefill.

Shape legend: P pages, T tokens of a step, R requests of it, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from trenchcoat.ops.compiled.decode import STATE_FIELDS, StatePages
from trenchcoat.students import RowState, StudentAttention

_SEEN = "seen_B"
_ALIGNMENT = 16
"""Bytes that a page's size is a multiple of."""


@dataclass(frozen=True)
class PageLayout:
    """The tensors of a page, widest dtypes first, so that each is aligned to its element size.

    The number of tokens seen is not among them: the server knows it.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Without the page axis; empty tensors (no sinks, no buffer) are left out."""
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, student: StudentAttention, dtype: torch.dtype) -> PageLayout:
        """For a student in a model of `dtype`: far sums float32, keys and values `dtype`, unless `state_dtype` says
        otherwise."""
        state = student.empty_state(1, dtype=dtype, device="meta").tensors()
        kept = [(name, t) for name, t in state.items() if t.numel() and name != _SEEN]
        kept.sort(key=lambda item: -item[1].element_size())
        return cls(
            names=tuple(name for name, _ in kept),
            shapes=tuple(tuple(t.shape[1:]) for _, t in kept),
            dtypes=tuple(t.dtype for _, t in kept),
        )

    @property
    def nbytes(self) -> int:
        """Size of a page."""
        used = sum(prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))
        return -(-used // _ALIGNMENT) * _ALIGNMENT

    def places(self, names: Sequence[str]) -> tuple[int, ...]:
        """Byte offsets of tensors in a page; 0 for those that it does not have."""
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        offsets = dict(zip(self.names, accumulate(sizes, initial=0), strict=False))
        return tuple(offsets.get(name, 0) for name in names)

    def cut(self, raw: Tensor) -> tuple[Tensor, ...]:
        """The tensors [P, *shape] of pages given as bytes, int8 [P, `nbytes` or more]: views."""
        offset, pages = 0, []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = prod(shape) * dtype.itemsize
            pages.append(raw[:, offset : offset + size].view(dtype).unflatten(1, shape))
            offset += size
        return tuple(pages)


@dataclass(frozen=True)
class StepRequests:
    """The requests of a step; the first ``decodes`` of them have one token each."""

    starts: Sequence[int]
    """Start of each request's tokens, and the end of the last; R + 1 numbers."""
    lengths: Sequence[int]
    """Tokens of each request so far, including this step's."""
    slots: Sequence[int]
    """Page of each request. A page's content before a request's first token is ignored."""
    decodes: int

    @cached_property
    def decoding(self) -> tuple[Tensor, Tensor]:
        """Pages of the requests that decode, and their tokens before this step; int64, on the CPU."""
        slots, lengths = torch.tensor((self.slots[: self.decodes], self.lengths[: self.decodes]))
        return slots, lengths - 1


@dataclass(frozen=True)
class Pages:
    """The pages of one layer."""

    student: StudentAttention
    layout: PageLayout
    raw: Tensor
    """int8 [P, `layout.nbytes` or more]."""
    dtype: torch.dtype
    """The model's."""
    in_place: bool
    """Decode each request in its page, which copies nothing (CPU). Else gather the states of all decoding requests and
    write them back, which takes one call for all (GPU)."""
    _empties: dict[int, RowState] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the state, over the pages."""
        return self.layout.cut(self.raw)

    @cached_property
    def _states(self) -> StatePages:
        return StatePages(self.raw, self._empty(1), self.layout.places(STATE_FIELDS[:-1]))

    def attend(
        self, qkv: tuple[Tensor, Tensor, Tensor], requests: StepRequests, *, scale: float, softcap: float | None = None
    ) -> Tensor:
        """y [T, H * D] of a step's tokens, after RoPE; the requests' pages are updated.

        ``qkv`` are q [T, H * D], k [T, G * D] and v [T, G * D].
        """
        dim, kv_heads = self.student.head_dim, self.student.num_kv_heads
        q, k, v = (x.unflatten(-1, (heads, dim)) for x, heads in zip(qkv, (-1, kv_heads, kv_heads), strict=True))
        y, decodes = torch.empty_like(q), requests.decodes
        scores = {"scale": scale, "softcap": softcap}
        if decodes:
            decode = self._decode_in_place if self.in_place else self._decode_gathered
            y[:decodes] = decode((q[:decodes], k[:decodes], v[:decodes]), requests, scores)
        for request in range(decodes, len(requests.lengths)):
            tokens = slice(requests.starts[request], requests.starts[request + 1])
            row = (x[tokens].transpose(0, 1)[None] for x in (q, k, v))
            before = requests.lengths[request] - (tokens.stop - tokens.start)
            state = self._in_page(requests.slots[request], before)
            y_row, after = self.student(*row, **scores, state=state)
            state.copy_(after)
            y[tokens] = y_row[0].transpose(0, 1)
        return y.flatten(1)

    def _decode_in_place(self, qkv: tuple[Tensor, ...], requests: StepRequests, scores: dict[str, Any]) -> Tensor:
        places, token = list(zip(requests.slots, requests.lengths, strict=True)), [x[:, :, None] for x in qkv]
        if self.student.decodes_pages(qkv[0], self._empty(1)):
            for slot, length in places[: requests.decodes]:
                if length == 1:
                    self._in_page(slot, 0)
            slots, seen = requests.decoding
            y = self.student.decode_pages(*token, states=self._states, slots_B=slots, seen_B=seen, **scores)
        else:
            states = [self._in_page(slot, length - 1) for slot, length in places[: requests.decodes]]
            y = self.student.decode_rows(*token, states=states, **scores)
        return y[:, :, 0]

    def _decode_gathered(self, qkv: tuple[Tensor, ...], requests: StepRequests, scores: dict[str, Any]) -> Tensor:
        before = [length - 1 for length in requests.lengths[: requests.decodes]]
        device = qkv[0].device
        slots = torch.tensor(requests.slots[: requests.decodes], device=device)
        first = torch.tensor([seen == 0 for seen in before], device=device)
        held = [page[slots] for page in self.tensors]
        for tensor in held:
            tensor[first] = 0
        state = self._state(held, before)
        y = self.student.decode(*(x[:, :, None] for x in qkv), state=state, **scores)
        for page, tensor in zip(self.tensors, held, strict=True):
            page[slots] = tensor
        return y[:, :, 0]

    def _in_page(self, slot: int, seen: int) -> RowState:
        """The state of one request, in its page."""
        held = [page[slot : slot + 1] for page in self.tensors]
        if not seen:
            for tensor in held:
                tensor.zero_()
        return self._state(held, [seen])

    def _state(self, held: Sequence[Tensor], seen: Sequence[int]) -> RowState:
        """A state of these tensors."""
        tensors = dict(zip(self.layout.names, held, strict=True))
        empty = self._empty(len(seen))
        return empty.replaced({**empty.tensors(), **tensors, _SEEN: torch.tensor(seen, device=held[0].device)})

    def _empty(self, rows: int) -> RowState:
        """A state with the tensors that are not in pages, which are empty."""
        if rows not in self._empties:
            state = self.student.empty_state(rows, dtype=self.dtype, device="meta")
            device, tensors = self.tensors[0].device, state.tensors()
            outside = {name: torch.empty_like(t, device=device) for name, t in tensors.items() if not t.numel()}
            self._empties[rows] = state.replaced({**tensors, **outside})
        return self._empties[rows]
