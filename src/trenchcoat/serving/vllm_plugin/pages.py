"""A request's state as pages of a server's caches, and attention of many requests' tokens over such pages.

The pages of a request are what :class:`trenchcoat.ops.RowState` holds for one row, each for as many heads: a few
tensors of fixed shapes, one after the other.
The tokens of a step are concatenated: first those of requests that decode (one token each), then those of requests that
prefill.

Shape legend: P pages, T tokens of a step, R requests of it, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from trenchcoat.ops import StudentState
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
    def of(cls, student: StudentAttention, dtype: torch.dtype, parts: int = 1) -> PageLayout:
        """For a student in a model of `dtype`, whose state is in `parts` pages, each with as many heads: far sums
        float32, keys and values `dtype`, unless `state_dtype` says otherwise."""
        state = student.empty_state(1, dtype=dtype, device="meta").tensors()
        kept = [(name, t) for name, t in state.items() if t.numel() and name != _SEEN]
        kept.sort(key=lambda item: -item[1].element_size())
        return cls(
            names=tuple(name for name, _ in kept),
            shapes=tuple((t.shape[1] // parts, *t.shape[2:]) for _, t in kept),
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
    caches: tuple[Tensor, ...]
    """int8 [P, `layout.nbytes` or more] each. A request's state is in one page of each; each has as many heads."""
    dtype: torch.dtype
    """The model's."""
    in_place: bool
    """Decode each request in its pages, which copies nothing (CPU). Else gather the states of all decoding requests and
    write them back, which takes one call for all (GPU)."""
    _empties: dict[int, RowState] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tensors(self) -> list[tuple[Tensor, ...]]:
        """Those of the state, over the pages of each cache."""
        return [self.layout.cut(raw) for raw in self.caches]

    @cached_property
    def _states(self) -> StatePages:
        like = self._empty(1)
        assert isinstance(like, StudentState)
        return StatePages(self.caches, like, self.layout.places(STATE_FIELDS[:-1]))

    @cached_property
    def _in_kernels(self) -> bool:
        """Whether the kernels decode in the pages."""
        like = torch.empty(0, dtype=self.dtype, device=self.caches[0].device)
        return self.student.decodes_pages(like, self._empty(1))

    def attend(
        self, qkv: tuple[Tensor, Tensor, Tensor], steps: Sequence[StepRequests], x_TM: Tensor | None = None, *,
        scale: float, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """y [T, H * D] of a step's tokens, after RoPE; the requests' pages are updated.

        ``qkv`` are q [T, H * D], k [T, G * D] and v [T, G * D]; ``steps`` are the same requests with their pages in
        each of the caches; ``x`` is the layer's input, for a student that reads it.
        """
        dim, kv_heads, requests = self.student.head_dim, self.student.num_kv_heads, steps[0]
        q, k, v = (x.unflatten(-1, (heads, dim)) for x, heads in zip(qkv, (-1, kv_heads, kv_heads), strict=True))
        y, decodes = torch.empty_like(q), requests.decodes
        scores: dict[str, Any] = {"scale": scale, "softcap": softcap}
        if decodes:
            given = scores if x_TM is None else {**scores, "x_BTM": x_TM[:decodes, None]}
            y[:decodes] = self._decode((q[:decodes], k[:decodes], v[:decodes]), steps, given)
        for request in range(decodes, len(requests.lengths)):
            tokens = slice(requests.starts[request], requests.starts[request + 1])
            row = (x[tokens].transpose(0, 1)[None] for x in (q, k, v))
            before = requests.lengths[request] - (tokens.stop - tokens.start)
            held = self._held([step.slots[request] for step in steps], before)
            given = scores if x_TM is None else {**scores, "x_BTM": x_TM[None, tokens]}
            y_row, after = self.student(*row, **given, state=self._state(held, [before]))
            self._write(after, held)
            y[tokens] = y_row[0].transpose(0, 1)
        return y.flatten(1)

    def _decode(self, qkv: tuple[Tensor, ...], steps: Sequence[StepRequests], given: dict[str, Any]) -> Tensor:
        """y [B, H, D] of one token of each request that decodes; `given` are the keywords of the student's calls."""
        before = [length - 1 for length in steps[0].lengths[: steps[0].decodes]]
        token = [x[:, :, None] for x in qkv]
        if not self.in_place:
            return self._decode_gathered(token, steps, before, given)
        if self._in_kernels:
            for request, seen in enumerate(before):
                if not seen:
                    self._held([step.slots[request] for step in steps], seen)
            slots, seen_B = [step.decoding[0] for step in steps], steps[0].decoding[1]
            y = self.student.decode_pages(*token, states=self._states, slots=slots, seen_B=seen_B, **given)
        elif len(steps) > 1:
            return self._decode_gathered(token, steps, before, given)
        else:
            held = [self._held([slot], seen) for slot, seen in zip(steps[0].slots, before, strict=False)]
            states = [self._state(tensors, [seen]) for tensors, seen in zip(held, before, strict=True)]
            y = self.student.decode_rows(*token, states=states, **given)
        return y[:, :, 0]

    def _decode_gathered(
        self, token: list[Tensor], steps: Sequence[StepRequests], before: list[int], given: dict[str, Any]
    ) -> Tensor:
        device, count = token[0].device, len(before)
        slots = [torch.tensor(step.slots[:count], device=device) for step in steps]
        first = torch.tensor([seen == 0 for seen in before], device=device)
        held = [[page[at] for page in tensors] for tensors, at in zip(self.tensors, slots, strict=True)]
        for tensor in chain(*held):
            tensor[first] = 0
        state = self._state(held, before)
        y = self.student.decode(*token, state=state, **given)
        self._write(state, held)
        for tensors, parts, at in zip(self.tensors, held, slots, strict=True):
            for page, tensor in zip(tensors, parts, strict=True):
                page[at] = tensor
        return y[:, :, 0]

    def _held(self, slots: Sequence[int], seen: int) -> list[list[Tensor]]:
        """The tensors of one request in its pages; zeros at its first token."""
        held = [[page[slot : slot + 1] for page in tensors] for tensors, slot in zip(self.tensors, slots, strict=True)]
        if not seen:
            for tensor in chain(*held):
                tensor.zero_()
        return held

    def _write(self, state: RowState, held: list[list[Tensor]]) -> None:
        """Put a state into `held`, unless it is there."""
        found = state.tensors()
        for number, name in enumerate(self.layout.names):
            for tensors, part in zip(held, found[name].chunk(len(held), 1), strict=True):
                if tensors[number].data_ptr() != part.data_ptr():
                    tensors[number].copy_(part)

    def _state(self, held: list[list[Tensor]], seen: Sequence[int]) -> RowState:
        """A state of the tensors of all parts; with one part, of these very tensors."""
        whole = held[0] if len(held) == 1 else [torch.cat(parts, 1) for parts in zip(*held, strict=True)]
        tensors = dict(zip(self.layout.names, whole, strict=True))
        empty = self._empty(len(seen))
        return empty.replaced({**empty.tensors(), **tensors, _SEEN: torch.tensor(seen, device=whole[0].device)})

    def _empty(self, rows: int) -> RowState:
        """A state with the tensors that are not in pages, which are empty."""
        if rows not in self._empties:
            state = self.student.empty_state(rows, dtype=self.dtype, device="meta")
            device, tensors = self.caches[0].device, state.tensors()
            outside = {name: torch.empty_like(t, device=device) for name, t in tensors.items() if not t.numel()}
            self._empties[rows] = state.replaced({**tensors, **outside})
        return self._empties[rows]
