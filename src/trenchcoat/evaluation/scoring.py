"""Scoring a causal language model on rows of text, and timing its decoding.

``score`` and ``decode_curve`` take a model as it is (the caller sets mode, adapters and far part),
so the same functions measure every row of the report's table.

Shapes: N rows, b rows of a batch, T tokens, V vocabulary. Position n is a query: its output predicts token n + 1.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trenchcoat.data.packing import IGNORED
from trenchcoat.evaluation.results import DecodePoint, Scores
from trenchcoat.evaluation.statistics import RowSums
from trenchcoat.runtime import distributed
from trenchcoat.runtime.sharding import compute_device

LOGIT_ELEMENTS = 1 << 24
"""Largest chunk of float32 logits computed at once, in elements (64 MiB)."""


@dataclass(frozen=True)
class EvalRows:
    """N rows of text, real tokens first, padding moved to the end."""

    ids: Tensor
    """[N, T] int64."""
    real: Tensor
    """[N, T] bool: True for tokens, False for padding."""
    counted: Tensor
    """[N, T] bool: tokens whose prediction counts; never the first of a row, which has no prediction."""


def gather_rows(rows: Tensor | Sequence[Mapping[str, Tensor]]) -> EvalRows:
    """Collect rows into one tensor, with padding at the end.

    ``rows`` is either [N, T] int64 ids without padding, or batches with ``input_ids`` [b, T] and, optionally,
    ``attention_mask`` [b, T] (0 at padding) and ``labels`` [b, T] (not shifted; -100 does not count).
    Raises ``ValueError`` if there is no row or no token to score.
    """
    batches: Sequence[Mapping[str, Tensor]] = [{"input_ids": rows}] if isinstance(rows, Tensor) else rows
    if not batches or not any(batch["input_ids"].numel() for batch in batches):
        raise ValueError("there are no rows to score: the validation split is empty; give it rows or a larger share")
    length = max(batch["input_ids"].shape[1] for batch in batches)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        ids = batch["input_ids"].cpu()
        real = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
        counted = batch.get("labels", ids).cpu() != IGNORED
        grow = (0, length - ids.shape[1])
        parts.append((F.pad(ids, grow), F.pad(real, grow), F.pad(counted, grow)))
    ids, real, counted = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.argsort((~real).int(), dim=1, stable=True)
    ids, real, counted = (tensor.gather(1, order) for tensor in (ids, real, counted))
    longest = int(real.sum(1).max())
    ids, real, counted = ids[:, :longest], real[:, :longest], (counted & real)[:, :longest].clone()
    counted[:, :1] = False
    if not counted.any():
        raise ValueError("no token counts: every label of the rows to score is -100, or the rows have one token each.")
    return EvalRows(ids, real, counted)


def recall_probes(rows: EvalRows, window: int) -> Tensor:
    """Find the tokens that can hardly be predicted without text from more than ``2 * window`` tokens ago.

    Token n + 1 of a row is a probe when all of these hold:

    1. The same trigram occurred before, far away: the two tokens before it and itself, (x[n-1], x[n], x[n+1]), occur
       together at an earlier place of the row that ends at or before n - 2W. So it can be looked up.
    2. The token itself does not occur among the last 2W tokens, x[n-2W+1 .. n], so a model that sees only those
       cannot copy it. (A terrace or sliding near set never holds more than 2W tokens.)
    3. The same three tokens occur together in no other of the N rows. This excludes what is likely
       in any text (`for i in`, `return None`) and leaves names, numbers and phrases of this text.

    A two-token context identifies its earlier occurrence better than one token and costs only a quarter of the
    probes: 32 rows of 1024 tokens of Python source give 360 to 1160 of them at W = 64 with a vocabulary of 2k. A stack
    of L windowed layers still carries information over more than 2W tokens, so the windowed rows of the table are not
    at chance: the probe compares rows and is not an absolute measure. Condition 3 depends on the rows scored together.

    Returns [N, T] bool at the probed tokens (index n + 1). O(N T log(N T)) time, no loop over tokens.
    """
    ids, length = rows.ids, rows.ids.shape[1]
    if length < 3:
        return torch.zeros_like(rows.real)
    tokens = _dense(ids)
    pairs = _dense(tokens[:, :-1] * (int(tokens.max()) + 1) + tokens[:, 1:])
    triples = _dense(pairs[:, :-1] * (int(tokens.max()) + 1) + tokens[:, 2:])
    # Padding comes after the real tokens, never before a probe; here it must not match the text of other rows.
    real_triples = rows.real[:, 2:]
    triples = torch.where(real_triples, triples, -1)
    place = torch.arange(length)
    newest_needed = place - 1 - 2 * window
    earliest = torch.full_like(ids, length)
    earliest[:, 2:] = _first_place(triples) + 2
    absent = _previous_place(tokens) <= newest_needed
    probes = (earliest <= newest_needed) & absent & rows.counted
    probes[:, 2:] &= _in_one_row(triples)
    return probes


def _dense(values: Tensor) -> Tensor:
    """Renumber to 0, 1, 2, ... keeping equality, so that products of two such numbers fit in int64."""
    return torch.unique(values, return_inverse=True)[1]


def _runs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: positions sorted by value (stable), and whether each has the same value as the one before."""
    ordered, places = torch.sort(values, dim=1, stable=True)
    repeats = torch.zeros_like(ordered, dtype=torch.bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return places, repeats


def _first_place(values: Tensor) -> Tensor:
    """[N, L] -> [N, L]: index of the first occurrence of this value in the row."""
    places, repeats = _runs(values)
    index = torch.arange(values.shape[1]).expand_as(values)
    start = torch.where(repeats, 0, index).cummax(dim=1).values
    return torch.empty_like(places).scatter_(1, places, places.gather(1, start))


def _previous_place(values: Tensor) -> Tensor:
    """[N, L] -> [N, L]: index of the last earlier occurrence of this value in the row; -1 when there is none."""
    places, repeats = _runs(values)
    before = torch.full_like(places, -1)
    before[:, 1:] = torch.where(repeats[:, 1:], places[:, :-1], -1)
    return torch.empty_like(places).scatter_(1, places, before)


def _in_one_row(values: Tensor) -> Tensor:
    """[N, L] -> [N, L] bool: this value occurs in one row only."""
    row = torch.arange(values.shape[0])[:, None].expand_as(values)
    known, inverse = torch.unique(values, return_inverse=True)
    present = torch.unique(torch.stack([inverse.flatten(), row.flatten()], dim=1), dim=0)
    rows_with = torch.bincount(present[:, 0], minlength=len(known))
    return rows_with[inverse] == 1


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the previous mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def score(
    model: nn.Module,
    rows: Tensor | Sequence[Mapping[str, Tensor]] | EvalRows,
    *,
    window: int,
    batch_size: int = 4,
    exact: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Next-token scores of ``model`` on N rows: over all tokens, past 2W, near, on recall probes, and by position.

    ``rows`` as in ``gather_rows``. ``window`` is the student's W, for the teacher too, so that all models are scored
    on the same tokens: token n + 1 is "past 2W" when n >= 2W, that is when more than 2W tokens come before it.
    ``exact``: tokens at the start of a row whose queries have their whole past in a student's near part, by default 2W
    (a terrace's). ``progress`` is called with the number of rows done. Padding and labels of -100 are left out. Losses
    are in nats, computed in float32, and summed in float64. Raises ``ValueError`` for a window or batch size below 1
    and for rows without a token to score.
    """
    if window < 1 or batch_size < 1:
        raise ValueError(f"window and batch_size must be at least 1; got window={window}, batch_size={batch_size}")
    text = rows if isinstance(rows, EvalRows) else gather_rows(rows)
    started = time.perf_counter()
    losses, hits = _all_losses(model, text.ids, batch_size, progress)
    counted, probes = text.counted[:, 1:], recall_probes(text, window)[:, 1:]
    query = torch.arange(losses.shape[1])
    rows_counted = counted.sum(0)
    by_position = torch.where(counted, losses, 0.0).sum(0) / rows_counted  # 0 / 0 gives the documented NaN
    return Scores(
        window=window,
        seq_len=text.ids.shape[1],
        all=_row_sums(losses, counted),
        far=_row_sums(losses, counted & (query >= 2 * window)),
        near=_row_sums(losses, counted & (query < (2 * window if exact is None else exact))),
        recall=_row_sums(losses, probes),
        recall_hits=_row_sums(hits.double(), probes),
        position_loss=[round(x, 6) for x in by_position.tolist()],
        position_count=rows_counted.tolist(),
        seconds=time.perf_counter() - started,
    )


def score_spans(
    model: nn.Module, ids: Tensor, spans: Sequence[tuple[int, int]], *, batch_size: int = 4
) -> list[RowSums]:
    """Losses of ``model`` on parts of rows [N, T], all read at once: for (first, stop) those of the queries from
    ``first`` on in the rows' beginnings of ``stop`` tokens."""
    losses, _ = _all_losses(model, ids, batch_size)
    parts = [losses[:, first : stop - 1] for first, stop in spans]
    return [_row_sums(part, torch.ones_like(part, dtype=torch.bool)) for part in parts]


def score_copies(model: nn.Module, ids: Tensor, *, batch_size: int = 4) -> tuple[RowSums, RowSums]:
    """(losses, right first choices) of ``model`` on the second halves of rows [N, 2 h] whose halves are equal."""
    losses, hits = _all_losses(model, ids, batch_size)
    second = slice(ids.shape[1] // 2 - 1, None)
    everything = torch.ones_like(hits[:, second])
    return _row_sums(losses[:, second], everything), _row_sums(hits[:, second].double(), everything)


def _all_losses(
    model: nn.Module, ids: Tensor, batch_size: int, progress: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """[N, T] ids -> losses [N, T - 1] float64 and hits [N, T - 1] bool; the processes share the rows."""
    losses = torch.zeros(len(ids), ids.shape[1] - 1, dtype=torch.float64)
    hits = torch.zeros_like(losses)
    with _evaluating(model):
        for first in distributed.share(range(0, len(ids), batch_size)):
            part = slice(first or 0, (first or 0) + batch_size)  # None: only takes part in collectives
            found = _token_losses(model, ids[part])
            if first is not None:
                losses[part], hits[part] = found
                if progress is not None:
                    progress(min(part.stop, len(ids)))
    return distributed.sum_tensor(losses), distributed.sum_tensor(hits).bool()


def _row_sums(values: Tensor, chosen: Tensor) -> RowSums:
    return RowSums(torch.where(chosen, values, 0.0).sum(1).tolist(), chosen.sum(1).tolist())


def _token_losses(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[b, T] ids -> losses [b, T - 1] float64 and hits [b, T - 1] bool, on the CPU; padding gets arbitrary values.

    No mask is needed: padding comes after the real tokens, and a causal model does not look ahead.
    """
    ids = ids.to(compute_device(model))
    logits = model(input_ids=ids, use_cache=False).logits
    piece = max(1, LOGIT_ELEMENTS // (logits.shape[0] * logits.shape[2]))
    losses, hits = [], []
    for first in range(0, ids.shape[1] - 1, piece):
        targets = ids[:, first + 1 : first + 1 + piece]
        part = logits[:, first : first + targets.shape[1]].float()
        losses.append(F.cross_entropy(part.transpose(1, 2), targets, reduction="none"))
        hits.append(part.argmax(-1) == targets)
    return torch.cat(losses, dim=1).double().cpu(), torch.cat(hits, dim=1).cpu()


def cache_bytes(cache: Any) -> int:
    """Bytes of memory held by all tensors reachable from a cache object, each storage counted once.

    Whole storages are counted, not views, so a small view that keeps a large buffer alive costs the buffer.
    """
    storages: dict[tuple[str, int], int] = {}
    seen: set[int] = set()
    stack = [cache]
    while stack:
        item = stack.pop()
        if id(item) in seen or item is None or isinstance(item, str | bytes | int | float | nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[str(item.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        elif hasattr(item, "__dict__") and not callable(item):
            stack.extend(vars(item).values())
    return sum(storages.values())


def decode_curve(
    model: nn.Module, lengths: Sequence[int], *, steps: int = 80, warmup: int = 3, seed: int = 0
) -> list[DecodePoint]:
    """Decoding time and cache size after contexts of ``lengths`` tokens, batch of one.

    For each length: random tokens are read in one call (the model creates its cache), then decoded one token at a
    time, ``warmup`` steps untimed and ``steps`` timed. The median is robust to other work on the machine; the mean
    is kept too, because it includes the step, one in every W, that folds a chunk into the far state
    (so ``steps`` should be at least W). The cache's bytes are those of its tensors right after the context was read.
    Raises ``ValueError`` for a length below 1.
    """
    if any(length < 1 for length in lengths) or steps < 1:
        raise ValueError(f"context lengths and steps must be at least 1; got lengths={tuple(lengths)}, steps={steps}")
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    with _evaluating(model):
        return [
            _decode_point(
                model, torch.randint(vocabulary, (1, length + warmup + steps), generator=generator), length, warmup
            )
            for length in lengths
        ]


def _decode_point(model: nn.Module, ids: Tensor, context: int, warmup: int) -> DecodePoint:
    """[1, context + warmup + steps] ids -> one point of the curve."""
    device = compute_device(model)
    ids = ids.to(device)
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    started = _clock(device)
    cache = model(input_ids=ids[:, :context], use_cache=True, **short).past_key_values
    prefill = _clock(device) - started
    held = cache_bytes(cache)
    times = []
    for position in range(context, ids.shape[1]):
        started = _clock(device)
        cache = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True).past_key_values
        times.append(1e3 * (_clock(device) - started))
    timed = torch.tensor(times[warmup:])
    low, middle, high = timed.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return DecodePoint(context, middle, (low, high), 1e3 * prefill, held, timed.mean().item())


def _clock(device: torch.device) -> float:
    """Time in seconds, after synchronizing the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
