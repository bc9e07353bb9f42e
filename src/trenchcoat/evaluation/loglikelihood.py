"""Log-probabilities of continuations; prefixes that contexts share are computed once.

Few-shot prompts of one subject share a prefix: the model reads it once, and every row of a batch continues from a copy
of its cache. The cache of a linearized layer has a constant size, so the copy costs the same whatever the length of the
prefix; softmax layers work too, with a cache that grows.

Shape legend: b rows of a batch, T columns of a call, K columns whose logits are kept, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trenchcoat.config import UserError
from trenchcoat.models.rotary import length_dependence
from trenchcoat.runtime.sharding import compute_device
from trenchcoat.students import StudentAttention

Ids = NDArray[np.int64]

LEAST_SAVED = {"cpu": 256}
"""Tokens that sharing a prefix must save to be worth a forward pass of its own, by device; else LEAST_SAVED_GPU."""
LEAST_SAVED_GPU = 8192
MOST_KEPT = 64
"""Trailing positions of a row whose logits may be kept for requests that are prefixes of it."""
CALL_TOKENS = {"cpu": 1 << 14}
"""Tokens per forward pass with an automatic batch size, by device; else CALL_TOKENS_GPU, halved when out of memory."""
CALL_TOKENS_GPU = 1 << 17


class Request(NamedTuple):
    """Token ids of a context (at least one) and of the continuation to score (at least one)."""

    context: Sequence[int]
    continuation: Sequence[int]


class Answer(NamedTuple):
    """How likely a continuation is."""

    logprob: float
    """Sum over its tokens of log p, in nats."""
    greedy: bool
    """Each of its tokens is the model's first choice."""
    hits: int
    """Number of its tokens that are the model's first choice."""
    tokens: int
    """Number of its tokens."""


@dataclass
class ScoringCost:
    """What scoring cost."""

    rows: int = 0
    """Distinct rows scored (one-token continuations of one context are one row)."""
    tokens_given: int = 0
    """Tokens of those rows."""
    tokens_read: int = 0
    """Tokens that the model read for them, without padding."""
    beginnings: int = 0
    """Shared prefixes that were read once."""


@dataclass(frozen=True)
class RowGroup:
    """Rows that share their first ``shared`` tokens; 0: nothing is shared."""

    shared: int
    members: list[int]


@dataclass
class _Row:
    ids: Ids
    """The tokens that the model reads: the context, and the continuation without its last token."""
    kept: int
    """Trailing positions whose logits are needed."""
    askers: list[tuple[int, int]]
    """(request, tokens of the row after those that the request reads)."""

    @property
    def shareable(self) -> Ids:
        """The part that may be a shared prefix: all but the positions whose logits are needed."""
        return self.ids[: len(self.ids) - self.kept]


def _distinct_rows(requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Row]:
    """The rows to read, sorted: requests whose tokens equal another's, or a prefix of another's, share a row."""
    rows: dict[bytes, _Row] = {}
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise ValueError(f"request {number} has an empty context or continuation; each needs a token")
        ids = np.asarray([*context, *continuation[:-1]], dtype=np.int64)
        row = rows.setdefault(ids.astype(">u4").tobytes(), _Row(ids, 0, []))  # big-endian, so bytes sort as the ids do
        row.kept = max(row.kept, len(continuation))
        row.askers.append((number, 0))
    found: list[_Row] = []
    longer, key_of_longer = None, b""
    for key in sorted(rows, reverse=True):
        row = rows[key]
        behind = len(key_of_longer) // 4 - len(row.ids)
        if longer is not None and key_of_longer.startswith(key) and behind + row.kept <= MOST_KEPT:
            longer.kept = max(longer.kept, behind + row.kept)
            longer.askers += [(number, behind) for number, _ in row.askers]
        else:
            longer, key_of_longer = row, key
            found.append(row)
    return found[::-1]


class LoglikelihoodScorer:
    """Scores requests on a model that is ready (the caller sets mode, LoRA and far part).

    Args:
        batch_size: rows per forward pass; None: as many as fit in ``CALL_TOKENS``, halved when out of GPU memory.
        share: read shared prefixes once. Ignored (see ``why_not``) for models whose rotary embedding
            depends on the length of the whole text.
        progress: called with the numbers of requests done and in all.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int | None = None,
        share: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.device = model, compute_device(model)
        self.batch_size, self.progress = batch_size, progress
        self.why_not = "" if share else "it was switched off"
        rotary = length_dependence(model.config.get_text_config())
        if share and rotary is not None:
            self.why_not = f"its rotary embedding is {rotary.kind!r}, which depends on the length of the text"
        self.share = not self.why_not
        self.budget = CALL_TOKENS.get(self.device.type, CALL_TOKENS_GPU)
        self.work = ScoringCost()
        self._least_columns = _least_columns(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def scores(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        """One answer per :class:`Request` (or plain pair), in order.

        Raises ``ValueError`` for an empty context or continuation.
        """
        rows = _distinct_rows(requests)
        answers: list[Answer | None] = [None] * len(requests)
        done = 0
        if self.progress is not None:
            self.progress(0, len(requests))
        with torch.no_grad():
            for members, logp_bKV in self._calls(rows):
                for place, row in enumerate(members):
                    for number, before_end in rows[row].askers:
                        answers[number] = _answer(logp_bKV[place], requests[number][1], before_end)
                        done += 1
                if self.progress is not None:
                    self.progress(done, len(requests))
        return [answer for answer in answers if answer is not None]

    def _calls(self, rows: list[_Row]) -> Iterator[tuple[list[int], Tensor]]:
        """(members, log-probabilities [b, K, V] float32, aligned at the last column) of each forward pass."""
        least = LEAST_SAVED.get(self.device.type, LEAST_SAVED_GPU)
        groups = (
            plan_groups([row.shareable for row in rows], least) if self.share else [RowGroup(0, [*range(len(rows))])]
        )
        self.work.rows += len(rows)
        self.work.tokens_given += sum(len(row.ids) for row in rows)
        for group in groups:
            prefix = self._read(rows[group.members[0]].ids[: group.shared]) if group.shared else None
            left = sorted(group.members, key=lambda i: -len(rows[i].ids))
            while left:
                members = left[: self._rows_of_a_call(len(rows[left[0]].ids) - group.shared)]
                logits = self._try(prefix, group.shared, [rows[i] for i in members])
                if logits is None:  # out of memory: retry with the lower limit
                    continue
                left = left[len(members) :]
                yield members, logits

    def _rows_of_a_call(self, longest: int) -> int:
        columns = max(longest, self._least_columns)
        return self.batch_size if self.batch_size is not None else max(1, self.budget // columns)

    def _try(self, prefix: Any, shared: int, rows: list[_Row]) -> Tensor | None:
        try:
            return self._forward(prefix, shared, rows)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise UserError(
                    f"out of memory with a single row of {len(rows[0].ids)} tokens: use a larger device, or "
                    "shorter contexts (--max-length, fewer --num-fewshot)"
                ) from error
            self.budget = max(1, self.budget // 2)
            self.batch_size = None if self.batch_size is None else max(1, len(rows) // 2)
            torch.cuda.empty_cache()
            return None

    def _read(self, ids: Ids) -> Any:
        """The cache after a prefix."""
        self.work.tokens_read += len(ids)
        self.work.beginnings += 1
        ids_1T = torch.from_numpy(ids)[None].to(self.device)
        return self.model(input_ids=ids_1T, use_cache=True, **self._keep(1)).past_key_values

    def _forward(self, prefix: Any, shared: int, rows: list[_Row]) -> Tensor:
        """Log-probabilities [b, K, V] float32 at the last columns; rows are left-padded."""
        rests = [row.ids[shared:] for row in rows]
        columns = max(self._least_columns, *(len(rest) for rest in rests))
        kept = max(row.kept for row in rows)
        ids_bT = torch.zeros(len(rows), columns, dtype=torch.int64)
        mask_bT = torch.zeros(len(rows), columns, dtype=torch.int64)
        for place, rest in enumerate(rests):
            ids_bT[place, columns - len(rest) :] = torch.from_numpy(rest)
            mask_bT[place, columns - len(rest) :] = 1
        placed: dict[str, Tensor] = {}
        if not mask_bT.all():
            whole = torch.cat([torch.ones(len(rows), shared, dtype=torch.int64), mask_bT], dim=1)
            position_bT = shared + (mask_bT.cumsum(1) - 1).clamp_min(0)
            placed = {"attention_mask": whole.to(self.device), "position_ids": position_bT.to(self.device)}
        cache = None
        if prefix is not None:
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(rows))
        out = self.model(
            input_ids=ids_bT.to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **placed,
            **self._keep(kept),
        )
        self.work.tokens_read += int(mask_bT.sum())
        return out.logits[:, -kept:].float().log_softmax(-1)

    def _keep(self, positions: int) -> dict[str, int]:
        return {"logits_to_keep": positions} if self._keeps else {}


def _answer(logp_KV: Tensor, continuation: Sequence[int], before_end: int) -> Answer:
    tokens = torch.as_tensor(continuation, device=logp_KV.device)
    end = logp_KV.shape[0] - before_end
    logp_nV = logp_KV[end - len(tokens) : end]
    hits = logp_nV.argmax(-1) == tokens
    logprob = logp_nV.gather(1, tokens[:, None]).double().sum()
    return Answer(float(logprob), bool(hits.all()), int(hits.sum()), len(tokens))


def _least_columns(model: Any) -> int:
    """Columns below which a call with a cache would go through the decoding step, token by token."""
    windows = [m.cfg.window for m in model.modules() if isinstance(m, StudentAttention) and m.mode == "student"]
    return 1 + max(windows, default=0)


@dataclass
class _Node:
    """Rows that share their first ``depth`` tokens; ``pool``: those not yet in a group."""

    depth: int
    pool: list[int] = field(default_factory=list)


def plan_groups(rows: Sequence[Ids], least_saved: int) -> list[RowGroup]:
    """Group rows by shared prefix; ``rows`` are sorted.

    Going up the tree of common prefixes, rows become a group where reading their prefix once saves more than
    ``least_saved`` tokens over the next shorter common prefix. O(total tokens).
    """
    groups: list[RowGroup] = []
    stack = [_Node(0)]
    common = [0, *(_common(a, b) for a, b in pairwise(rows)), 0]
    for i in range(len(rows) + 1):
        before = common[i]
        while stack[-1].depth > before:
            node = stack.pop()
            above = max(stack[-1].depth, before)
            if _saved(node, above) > least_saved:
                groups.append(RowGroup(node.depth, node.pool))
                node.pool = []
            if stack[-1].depth < before:
                stack.append(_Node(before, node.pool))
            else:
                stack[-1].pool += node.pool
        if i < len(rows):
            if common[i + 1] > stack[-1].depth:
                stack.append(_Node(common[i + 1]))
            stack[-1].pool.append(i)
    if stack[0].pool:
        groups.append(RowGroup(0, stack[0].pool))
    return groups


def _saved(node: _Node, above: int) -> int:
    """Tokens saved by reading this node's prefix once, compared with sharing only ``above`` tokens."""
    return len(node.pool) * (node.depth - above) - node.depth


def _common(a: Ids, b: Ids) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
