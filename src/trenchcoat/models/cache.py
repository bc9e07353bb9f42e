"""The generation cache of a linearized layer: a state of constant size, and keys and values of kept groups.

A :class:`StateLayer` replaces a layer in any `Cache` that Transformers creates, so `generate()` needs no override: beam
search, batches, continuation and chunked prefill go through the methods below.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from trenchcoat.models.kept import KeptKeys
from trenchcoat.models.transformers_internals import (
    FixedSizeLayer,
    allocated_length,
    cache_layer,
    detach_keys_and_values,
    is_filled,
    keys_and_values,
    records_past,
)
from trenchcoat.students import RowState

RECORDED = 512
"""Most tokens that can be taken back, where their past is recorded."""

Replay = Callable[[RowState | None, int], RowState]
"""(state before a call, first so many of its tokens) -> the state after these."""


class StateLayer(FixedSizeLayer):
    """The cache of one linearized layer: a student's state and the number of columns seen (padding included).

    `state` is None before the first token. Attention reads and replaces it. Only `kept` grows: keys and values of the
    groups that keep softmax attention, in layers that have any.

    Speculative decoding takes back the tokens that were proposed and not accepted. A sum cannot be subtracted from
    without an error, so while `record_past` is set the layer has a copy of the state as it was after the last `crop`
    and the calls since then, and `crop` runs those tokens again that stay.
    """

    def __init__(self, mask_length: int | None = None) -> None:
        super().__init__()
        self.state: RowState | None = None
        self.kept: KeptKeys | None = None
        self.tokens = 0
        self.mask_length = mask_length
        """Length of the mask when the cache's other layers are preallocated; None when they grow."""
        self._home: torch.device | None = None
        self.record_past = False
        self._before: RowState | None = None
        self._calls: list[tuple[int, Replay]] = []

    def activate_past_recording(self) -> None:
        """Make it possible to take back tokens from now on."""
        self.record_past = True

    def record(self, tokens: int, replay: Replay) -> None:
        """Note a call of `tokens` tokens that is about to be made; beyond `RECORDED` of them earlier calls are
        forgotten."""
        if sum(count for count, _ in self._calls) + tokens > RECORDED:
            self.forget()
        if not self._calls and self.state is not None:
            self._before = self.state.clone()
        self._calls.append((tokens, replay))

    def forget(self) -> None:
        """Forget what was recorded."""
        self._before, self._calls = None, []

    def advance(self, state: RowState, tokens: int) -> None:
        """Store the state after `tokens` more columns."""
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def kept_keys(self, window: int | None) -> KeptKeys:
        """The keys and values of kept groups, created on first use; `window` is the layer's own sliding window."""
        if self.kept is None:
            self.kept = KeptKeys(self.mask_length)
        self.kept.window, self.kept.keeps_past = window, self.record_past
        return self.kept

    def nbytes(self) -> int:
        """Bytes held."""
        constant = 0 if self.state is None else self.state.nbytes()
        return constant + (0 if self.kept is None else self.kept.nbytes())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No-op: the attention creates the state, whose shape only the student knows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: softmax attention cannot continue from a linear state."""
        raise ValueError(
            "this cache holds the state of linearized layers, which softmax attention cannot read; start a new cache "
            "after changing the mode"
        )

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self.tokens

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns, offset) of the mask that the model's softmax layers need."""
        return self.mask_length or self.tokens + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.state = self.kept = None
        self.forget()
        self.tokens = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens, which must have come since the last crop with past
        recording active; a number above 0 is the length to shorten to, 0 only forgets what was recorded."""
        shorter = -tokens_to_remove if tokens_to_remove < 0 else self.tokens - tokens_to_remove
        removed = max(0, shorter) if tokens_to_remove else 0
        stay = sum(count for count, _ in self._calls) - removed
        if removed and stay < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) on a linearized layer that has seen {self.tokens} tokens: a recurrent state "
                f"cannot be rolled back, except for tokens (at most {RECORDED}) that were read after "
                "cache.activate_past_recording() and since the last crop; or copy the cache before the tokens you may "
                "want to undo"
            )
        if removed:
            state = self._before
            for count, replay in self._calls:
                if stay > 0:
                    state = replay(state, min(count, stay))
                stay -= count
            self.state = state
            self.tokens -= removed
        if self.kept is not None and (removed or self.record_past):
            self.kept.crop(removed)
        self.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows: beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.forget()
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats)
        if self.kept is not None:
            self.kept.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick rows by integer indices [n] or a bool mask [B]."""
        self.forget()
        index = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        if self.state is not None:
            self.state = self.state.index_select(index)
        if self.kept is not None:
            self.kept.index_select(index)

    def detach(self) -> None:
        """Gradients of later tokens end here."""
        self.forget()
        if self.state is not None:
            self.state = self.state.detach()
        if self.kept is not None:
            self.kept.detach()

    def offload(self) -> None:
        """Move everything to the CPU."""
        if self.state is not None:
            self._home = self.state.seen_B.device
            self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to where it was."""
        if self._home is not None:
            self._move(self._home)

    def _move(self, device: torch.device) -> None:
        if self.state is not None:
            self.state = self.state.to(device)
        if self.kept is not None:
            self.kept.to(device)


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The state layer at `index` of `cache`, created on first use.

    Raises ValueError when softmax attention has already filled that layer.
    """
    layer = cache_layer(cache, index)
    if isinstance(layer, StateLayer):
        return layer
    if is_filled(layer):
        raise ValueError(
            f"layer {index} of this cache was filled by softmax attention, which a linearized layer cannot continue "
            "from; start a new cache after changing the mode"
        )
    fresh = StateLayer(mask_length=allocated_length(layer))
    fresh.record_past = records_past(cache)
    cache.layers[index] = fresh
    return fresh


def new_cache(model: Any) -> Cache:
    """An empty cache for `model`, which grows as far as its layers' own attention does."""
    return DynamicCache(config=model.config)


def detach_cache(cache: Cache) -> None:
    """Cut what a cache holds off the computation that made it: gradients of later tokens end there."""
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            layer.detach()
        else:
            detach_keys_and_values(layer)


def cache_nbytes(cache: Cache) -> int:
    """Bytes held by a cache, softmax layers (keys and values) and linearized layers alike."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            total += layer.nbytes()
        else:
            total += sum(tensor.nbytes for tensor in keys_and_values(layer))
    return total
