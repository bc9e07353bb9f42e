"""Keys and values of the groups that keep softmax attention: the part of a linearized layer's cache that grows.

Shape legend: B rows, G kept key/value heads, T new tokens, N tokens held, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 64
"""Smallest number of tokens that memory is taken for at once."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the text the held keys are, for their mask."""

    length: int
    """Tokens held, N."""
    offset: int
    """Earlier columns, which the model's own window has left behind."""
    query_offset: int
    """Columns before the newest tokens."""
    real_BN: Tensor | None
    """False at padding, bool [B, offset + N]; None when every column is real."""


class KeptKeys:
    """Keys [B, G, N, D] and values [B, G, N, E], appended in place.

    Memory is taken for half as many tokens again whenever it is used up, so a token is copied about twice altogether,
    not once for each later token. With `window` (the model's own sliding window) older tokens are dropped.
    """

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        """Tokens that memory is taken for at first; None for a few more than there are."""
        self.window: int | None = None
        self.keeps_past = False
        """Whether tokens that the window has left behind are held until the next crop, which may bring them back."""
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._real: Tensor | None = None
        self._start = self._stop = 0
        self.dropped = 0
        """Columns that are not held any more."""

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def seen(self) -> int:
        """Columns appended so far."""
        return self.dropped + len(self)

    @property
    def keys(self) -> Tensor:
        """The keys held, [B, G, N, D]; a view."""
        assert self._keys is not None
        return self._keys[:, :, self._start : self._stop]

    @property
    def values(self) -> Tensor:
        """The values held, [B, G, N, E]; a view."""
        assert self._values is not None
        return self._values[:, :, self._start : self._stop]

    @property
    def allocated(self) -> int:
        """Tokens that there is memory for."""
        return 0 if self._keys is None else self._keys.shape[2]

    def append(self, k_BGTD: Tensor, v_BGTE: Tensor, real_BT: Tensor | None = None) -> Columns:
        """Add tokens; `real_BT` is False at padding. Returns what the mask of these queries has to cover."""
        before, tokens = self.seen, k_BGTD.shape[2]
        self._note_padding(real_BT, before, k_BGTD)
        if not self.keeps_past:
            self._drop()
        if torch.is_grad_enabled() and (k_BGTD.requires_grad or v_BGTE.requires_grad):
            earlier = (self.keys, self.values) if len(self) else (k_BGTD[:, :, :0], v_BGTE[:, :, :0])
            self._hold(torch.cat((earlier[0], k_BGTD), 2), torch.cat((earlier[1], v_BGTE), 2))
        else:
            self._reserve(k_BGTD, v_BGTE)
            assert self._keys is not None
            assert self._values is not None
            self._keys[:, :, self._stop : self._stop + tokens] = k_BGTD
            self._values[:, :, self._stop : self._stop + tokens] = v_BGTE
            self._stop += tokens
        return Columns(len(self), self.dropped, before, self._real)

    def _drop(self) -> None:
        """Drop what the window of the next token does not reach."""
        surplus = 0 if self.window is None else max(0, len(self) - self.window + 1)
        self._start += surplus
        self.dropped += surplus

    def crop(self, tokens: int) -> None:
        """Take back the newest tokens."""
        self._stop -= tokens
        if self._real is not None:
            self._real = self._real[:, : self._real.shape[1] - tokens]
        self._drop()

    @property
    def padded(self) -> bool:
        """Whether some column is padding."""
        return self._real is not None

    def with_room(self, k_BGTD: Tensor, v_BGTE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values held, followed by room for as many as these: [B, G, N + T, D] and [B, G, N + T, E]; views."""
        self._reserve(k_BGTD, v_BGTE)
        assert self._keys is not None
        assert self._values is not None
        span = slice(self._start, self._stop + k_BGTD.shape[2])
        return self._keys[:, :, span], self._values[:, :, span]

    def filled(self, tokens: int) -> None:
        """Count tokens that were written into :meth:`with_room`."""
        self._stop += tokens

    def _note_padding(self, real_BT: Tensor | None, before: int, like: Tensor) -> None:
        if real_BT is None and self._real is None:
            return
        rows, tokens = like.shape[0], like.shape[2]
        earlier = self._real if self._real is not None else like.new_ones(rows, before, dtype=torch.bool)
        newest = like.new_ones(rows, tokens, dtype=torch.bool) if real_BT is None else real_BT.bool()
        self._real = torch.cat((earlier, newest), 1)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self._start, self._stop = 0, keys.shape[2]

    def _reserve(self, k: Tensor, v: Tensor) -> None:
        """Make room for the tokens of k and v after those held."""
        held, needed = len(self), len(self) + k.shape[2]
        if self._stop + k.shape[2] <= self.allocated:
            return
        room = max(needed + needed // 2, ROOM, self.room or 0)
        parts = []
        for name, new in (("keys", k), ("values", v)):
            made = new.new_empty(*new.shape[:2], room, new.shape[3])
            if held:
                made[:, :, :held] = getattr(self, name).detach()
            parts.append(made)
        self._keys, self._values = parts
        self._start, self._stop = 0, held

    # Rows, devices, files

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._keys is not None:
            self._hold(change(self.keys), change(self.values))
        if self._real is not None:
            self._real = change(self._real)

    def index_select(self, index: Tensor) -> None:
        """Keep the rows `index`, int64 [n]; repeats allowed."""
        self._each(lambda t: t.index_select(0, index.to(t.device)))

    def repeat_interleave(self, n: int) -> None:
        """Every row n times, copies of a row adjacent."""
        self._each(lambda t: t.repeat_interleave(n, dim=0))

    def detach(self) -> None:
        """Gradients of later tokens end here."""
        self._each(Tensor.detach)

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        self._each(lambda t: t.to(device))

    def nbytes(self) -> int:
        """Bytes of the tokens held; up to half as many again may be allocated."""
        real = 0 if self._real is None else self._real.nbytes
        return real + (0 if self._keys is None else self.keys.nbytes + self.values.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: `keys`, `values`, and `real` (bool [B, columns seen]) if there is padding."""
        found = {} if self._keys is None else {"keys": self.keys.contiguous(), "values": self.values.contiguous()}
        return found if self._real is None else {**found, "real": self._real}

    def restore(self, tensors: dict[str, Tensor], seen: int) -> None:
        """Take over what :meth:`tensors` gave; `seen` is the number of columns appended then."""
        self._hold(tensors["keys"], tensors["values"])
        self._real = tensors.get("real")
        self.dropped = seen - len(self)
