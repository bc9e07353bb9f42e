"""Which heads of a layer each tensor-parallel process computes, and which of them keep softmax attention.

A group is one key/value head with its query heads. vLLM gives each process neighbouring groups, or, where there are
more processes than groups, a part of one group's query heads. Weights and settings count groups over the whole layer;
inside a process they are counted from its first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trenchcoat.config import StudentConfig
from trenchcoat.config.keep import kept_groups
from trenchcoat.models.auto import student_settings


@dataclass(frozen=True)
class Share:
    """The heads of one layer that process `rank` of `ranks` computes."""

    kept_all: tuple[int, ...]
    """Groups of the layer that keep softmax attention."""
    num_heads: int
    """Query heads of the layer."""
    num_kv_heads: int
    """Groups of the layer."""
    rank: int = 0
    ranks: int = 1

    @property
    def parts(self) -> int:
        """Processes that share a group."""
        return max(1, self.ranks // self.num_kv_heads)

    @property
    def groups(self) -> range:
        """The process's groups, counted over the layer."""
        each = max(1, self.num_kv_heads // self.ranks)
        first = self.rank // self.parts * each
        return range(first, first + each)

    @property
    def heads(self) -> int:
        """Query heads of each group in this process."""
        return self.num_heads // self.num_kv_heads // self.parts

    @property
    def kept(self) -> tuple[int, ...]:
        """The process's groups that keep softmax attention, counted from its first."""
        return tuple(i for i, group in enumerate(self.groups) if group in self.kept_all)

    @property
    def free(self) -> tuple[int, ...]:
        """The process's groups that a student computes, counted from its first."""
        return tuple(i for i, group in enumerate(self.groups) if group not in self.kept_all)

    def query_heads(self, groups: Iterable[int]) -> list[int]:
        """The query heads of some of the process's groups."""
        return [group * self.heads + head for group in groups for head in range(self.heads)]

    def of_student(self, whole: Tensor) -> Tensor:
        """The process's heads of a student's parameter (heads first; the layer's free heads, or one a free group)."""
        free = [group for group in range(self.num_kv_heads) if group not in self.kept_all]
        each, part = whole.shape[0] // len(free), self.rank % self.parts
        mine = range(part * each // self.parts, (part + 1) * each // self.parts) if each > 1 else range(1)
        return whole[[free.index(self.groups[group]) * each + head for group in self.free for head in mine]]


def share_of(cfg: StudentConfig, layer: int, *, num_heads: int, num_kv_heads: int, rank: int, ranks: int) -> Share:
    """The share of one process in a layer of a model with these student settings."""
    return Share(kept_groups(cfg, layer, num_kv_heads), num_heads, num_kv_heads, rank, ranks)


def every_share(cfg: StudentConfig, layers: int, *, num_heads: int, num_kv_heads: int, ranks: int) -> list[Share]:
    """The shares of all processes in all layers."""
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "ranks": ranks}
    return [share_of(cfg, layer, rank=rank, **sizes) for layer in range(layers) for rank in range(ranks)]


def every_share_of(vllm_config: Any) -> list[Share]:
    """:func:`every_share` of the model and processes of vLLM's configuration."""
    config = vllm_config.model_config.hf_config
    return every_share(
        student_settings(config.trenchcoat["student"]),
        config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        ranks=vllm_config.parallel_config.tensor_parallel_size,
    )


def settle_heads(vllm_config: Any) -> None:
    """Tell vLLM how many key/value heads its attentions of kept groups have, in place of the model's: pages of states
    are rounded up to blocks of theirs."""
    at_once = kept_at_once(every_share_of(vllm_config))
    if at_once:
        heads = at_once * vllm_config.parallel_config.tensor_parallel_size
        vllm_config.model_config.model_arch_config.total_num_kv_heads = heads


def kept_at_once(shares: Iterable[Share]) -> int:
    """Kept groups that one attention of vLLM computes; 0 if nothing is kept.

    vLLM gives all attentions pages of one size, for layers of one number of groups. The greatest common divisor of the
    numbers of kept groups leaves no part of a page empty, and keeps a whole layer together where only whole ones are
    kept.
    """
    return math.gcd(*(len(share.kept) for share in shares))


def free_at_once(shares: Iterable[Share]) -> int:
    """Groups whose state is one page: as for :func:`kept_at_once`, so that no part of a page is empty; 0 if all groups
    are kept."""
    return math.gcd(*(len(share.free) for share in shares))
