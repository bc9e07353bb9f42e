"""Which heads of a layer keep softmax attention and which are a student's.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D dim of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeptHeads:
    """The split of a layer's heads, by key/value group: group i is key/value head i and its H / G query heads."""

    def __init__(self, groups: Sequence[int], *, num_heads: int, num_kv_heads: int) -> None:
        self.groups = tuple(groups)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        others = [group for group in range(num_kv_heads) if group not in self.groups]
        each = num_heads // num_kv_heads
        kept, free = self._heads(self.groups, each), self._heads(others, each)
        order = sorted(range(num_heads), key=(kept + free).__getitem__)
        lists = {(num_kv_heads, True): list(self.groups), (num_kv_heads, False): others}
        self._lists = {**lists, (num_heads, True): kept, (num_heads, False): free, (0, True): order}
        self._indices: dict[tuple[tuple[int, bool], torch.device], Tensor] = {}

    @staticmethod
    def _heads(groups: Sequence[int], each: int) -> list[int]:
        return [group * each + i for group in groups for i in range(each)]

    def _index(self, key: tuple[int, bool], device: torch.device) -> Tensor:
        if (key, device) not in self._indices:
            self._indices[key, device] = torch.tensor(self._lists[key], device=device)
        return self._indices[key, device]

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Among all heads and groups: the student's heads, the student's groups, the kept groups; int64, on the CPU."""
        keys = ((self.num_heads, False), (self.num_kv_heads, False), (self.num_kv_heads, True))
        free_heads, free_groups, kept_groups = (self._index(key, torch.device("cpu")) for key in keys)
        return free_heads, free_groups, kept_groups

    def kept(self, x: Tensor, dim: int = 1) -> Tensor:
        """The kept heads of a tensor with H or G entries along `dim`, in order."""
        return x.index_select(dim, self._index((x.shape[dim], True), x.device))

    def free(self, x: Tensor, dim: int = 1) -> Tensor:
        """The student's heads of a tensor with H or G entries along `dim`, in order."""
        return x.index_select(dim, self._index((x.shape[dim], False), x.device))

    def with_kept(self, x_BHTD: Tensor, other_BHTD: Tensor) -> Tensor:
        """`x`, [B, H, T, D], with `other` in the kept heads."""
        return x_BHTD.index_copy(1, self._index((self.num_heads, True), x_BHTD.device), self.kept(other_BHTD))

    def join(self, kept_BTHD: Tensor, free_BTHD: Tensor) -> Tensor:
        """Outputs [B, T, H, D] in the order of the heads, from those of the kept and of the student's heads."""
        return torch.cat((kept_BTHD, free_BTHD), 2).index_select(2, self._index((0, True), kept_BTHD.device))
