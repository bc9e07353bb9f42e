"""Training text: rows from a source, tokens by template, rows of fixed length, batches by index.

Call ``load_batches``. Tokens are kept on disk under a hash of everything they depend on; filtering, selection, packing,
the validation split and the order of rows are index arithmetic on top, so another ``seq_len``, ``min_tokens`` or seed
does not tokenize again. With ``data.streaming`` there is no token table: see ``trenchcoat.data.stream``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trenchcoat.config import DataConfig, UserError
from trenchcoat.config.recipe_io import check_section
from trenchcoat.config.settings import TEXT_HELD_OUT
from trenchcoat.data.batches import Batches
from trenchcoat.data.files import documents, is_file_path, is_text_path, split_sample
from trenchcoat.data.packing import PackedRows, pack
from trenchcoat.data.sources import (
    Source,
    dataset_source,
    dataset_splits,
    embedded_source,
    file_source,
    split_text_source,
    subsampled,
)
from trenchcoat.data.stream import StreamedBatches
from trenchcoat.data.stream_sources import open_stream
from trenchcoat.data.table import TokenTable
from trenchcoat.data.tokens import Say, content_hash, token_table, unwanted_lengths
from trenchcoat.models.embedded import Split
from trenchcoat.models.text import known_embeddings

FEW_HELD_OUT = 0.1
"""Share of the rows that is held out where there are no more than ``data.validation_rows``."""
FEW_ROWS = "few_rows"
"""Count of the rows of such a source."""

Rank = Callable[[str, TokenTable, NDArray[np.int64]], NDArray[np.float64]]
"""(content hash of the table, table, rows [r]) -> a score for each of those rows [r]; the largest are selected."""


def load_batches(
    cfg: DataConfig,
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int,
    rank: Rank | None = None,
    say: Say | None = None,
) -> Batches:
    """Batches of ``batch_size`` rows of ``cfg.seq_len`` tokens, tokenized now, read from the cache, or streamed.

    Validation rows are, in this order of preference: ``validation_path``; the ``validation`` split of a data set; the
    first ``validation_rows`` rows (a tenth, where there are no more than that), or the first ``validation_fraction`` of
    them; for a ``.txt`` file, its end. ``rank`` is needed for ``cfg.select`` (``trenchcoat.data.esl`` has one); ``say``
    is told how far tokenizing is. Raises ``UserError`` for data that is missing, empty, broken, of another schema, or
    too small.
    """
    check_section(cfg, "data")
    for name, value, least in (("batch_size", batch_size, 1), ("run.seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    known = known_embeddings(tokenizer) or len(tokenizer)
    marks = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((mark for mark in marks if mark is not None and mark < known), 0)  # any will do: padding is masked
    if cfg.streaming:
        return _stream(cfg, tokenizer, batch_size, seed, pad, say)
    train, validation, hold = _sources(cfg)
    limit, few = cfg.max_rows, dict[str, int]()
    if validation is None and limit is not None:
        limit += hold if isinstance(hold, int) else max(1, round(limit * hold / (1 - hold)))
    key, table = token_table(train, cfg, tokenizer, limit, say)
    if validation is not None:
        other_key, other = token_table(validation, cfg, tokenizer, None, say)
        spans = {"train": _Span(table, 0, table.rows, cfg), "validation": _Span(other, 0, other.rows, cfg)}
    else:
        if isinstance(hold, int) and table.rows <= hold:
            hold = FEW_HELD_OUT
            few = {FEW_ROWS: table.rows}
        held = hold if isinstance(hold, int) else min(max(1, round(table.rows * hold)), table.rows - 1)
        if held == 0:
            raise UserError(
                f"{train.name} has one row, which is not enough to hold one out for validation and train on the rest: "
                "give more rows, data.validation_path, or the text as a .txt file, the end of which is held out"
            )
        other_key = str(held)
        stop = table.rows if cfg.max_rows is None else min(table.rows, held + cfg.max_rows)
        spans = {"train": _Span(table, held, stop, cfg), "validation": _Span(table, 0, held, cfg)}
    if cfg.select != "none":
        spans["train"] = spans["train"].cut(cfg.seq_len)
    selected = spans["train"].select(rank, key, cfg)
    tables = [table] if validation is None else [table, other]
    return Batches(
        {"train": _packed("train", cfg, spans["train"]), "validation": _packed("validation", cfg, spans["validation"])},
        batch_size=batch_size,
        seed=seed,
        pad=pad,
        fingerprint=content_hash(
            key, other_key, cfg.packing, cfg.seq_len, *(mark for span in spans.values() for mark in span.mark())
        ),
        source_counts=_source_counts(tables, list(spans.values())) | selected | few,
    )


def _stream(cfg: DataConfig, tokenizer: Any, batch_size: int, seed: int, pad: int, say: Say | None) -> Batches:
    train, held = open_stream(cfg)
    validation = held if cfg.validation_path is None else _validation_source(cfg.validation_path, cfg)
    key, table = token_table(validation, cfg, tokenizer, None, say)
    span = _Span(table, 0, table.rows, cfg)
    return StreamedBatches(
        train,
        cfg,
        tokenizer,
        validation=_packed("validation", cfg, span),
        batch_size=batch_size,
        seed=seed,
        pad=pad,
        validation_key=key,
        source_counts=_source_counts([table], [span]),
    )


class _Span:
    """Rows ``first`` to ``stop`` of a table, and which of its samples are used."""

    def __init__(self, table: TokenTable, first: int, stop: int, cfg: DataConfig) -> None:
        self.table, self.first, self.stop = table, first, stop
        self.lengths = np.diff(table.offsets[first : stop + 1])
        self.keep = np.ones(stop - first, dtype=np.bool_)
        self.left_out: Counter[str] = Counter()
        for reason, unwanted in unwanted_lengths(self.lengths, cfg).items():
            self.keep &= ~unwanted
            self.left_out[reason] = int(unwanted.sum())

    def cut(self, seq_len: int) -> _Span:
        """The same, with samples cut into pieces of at most ``seq_len`` tokens; pieces of unwanted ones are too."""
        pieces = np.maximum(1, -(-np.diff(self.table.offsets) // seq_len))
        index = np.concatenate([[0], np.cumsum(pieces)])
        number = np.arange(index[-1]) - np.repeat(index[:-1], pieces)
        starts = np.repeat(self.table.offsets[:-1], pieces) + number * seq_len
        found = copy.copy(self)
        found.table = dataclasses.replace(self.table, offsets=np.append(starts, self.table.offsets[-1]))
        found.first, found.stop = int(index[self.first]), int(index[self.stop])
        found.lengths = np.diff(found.table.offsets[found.first : found.stop + 1])
        found.keep = np.repeat(self.keep, pieces[self.first : self.stop])
        return found

    def select(self, rank: Rank | None, key: str, cfg: DataConfig) -> dict[str, int]:
        """Keep the ``cfg.select_rows`` best pieces, in the order of the source; returns the counts."""
        if cfg.select == "none" or cfg.select_rows is None:
            return {}
        if rank is None:
            raise ValueError(f"data.select={cfg.select} needs a ranking: give load_batches its `rank`")
        candidates = np.flatnonzero(self.keep & (self.lengths > 1))  # one token alone has no label
        scores = rank(key, self.table, candidates + self.first)
        best = candidates[np.argsort(-scores, kind="stable")[: cfg.select_rows]]
        self.keep[:] = False
        self.keep[best] = True
        return {"train/rows_selected": len(best)}

    def mark(self) -> list[str]:
        """Which samples are dropped, as part of a hash; empty if none."""
        return [] if self.keep.all() else [np.packbits(self.keep).tobytes().hex()]


def _sources(cfg: DataConfig) -> tuple[Source, Source | None, int | float]:
    """Training source, validation source, and without the latter the rows (int) or the fraction (float) to hold out."""
    validation = None
    if cfg.validation_path is not None:
        validation = _validation_source(cfg.validation_path, cfg)
    if cfg.path == "embedded":
        return embedded_source("train"), validation or embedded_source("validation"), 0
    path, rows = split_sample(cfg.path)
    path = documents(path)
    if is_text_path(path) and validation is None:
        return split_text_source(path, cfg.validation_fraction or TEXT_HELD_OUT), None, 1
    hold = cfg.validation_rows if cfg.validation_fraction is None else cfg.validation_fraction
    if is_file_path(path):
        return subsampled(file_source(path), rows), validation, hold
    splits = dataset_splits(path, cfg.subset)
    if validation is None and "validation" in splits and cfg.split != "validation":
        validation = dataset_source(path, splits, "validation")
    return subsampled(dataset_source(path, splits, cfg.split), rows), validation, hold


def _validation_source(path: str, cfg: DataConfig) -> Source:
    if path == "embedded":
        return embedded_source("validation")
    path, rows = split_sample(path)
    path = documents(path)
    if is_file_path(path):
        return subsampled(file_source(path), rows)
    splits = dataset_splits(path, None)
    return subsampled(dataset_source(path, splits, "validation" if "validation" in splits else cfg.split), rows)


def _packed(part: Split, cfg: DataConfig, span: _Span) -> PackedRows:
    table = span.table
    offsets = table.offsets[span.first : span.stop + 1]
    packed = pack(
        table.tokens,
        table.counted,
        offsets,
        seq_len=cfg.seq_len,
        contiguous=cfg.packing == "contiguous",
        keep=None if span.keep.all() else span.keep,
    )
    if packed.rows_masked and not len(packed):
        raise UserError(
            f"no {part} row has a label that counts ({packed.rows_masked} rows of at most {cfg.seq_len} tokens, all "
            "masked): set data.mask_prompt=false, raise data.seq_len, or give rows with longer answers"
        )
    if not len(packed) and span.left_out and not (span.keep & (span.lengths > 0)).any():
        raise UserError(
            f"no {part} sample has between data.min_tokens={cfg.min_tokens} and data.max_tokens={cfg.max_tokens} "
            f"tokens ({span.left_out['too short']} are shorter, {span.left_out['too long']} longer; the longest has "
            f"{span.lengths.max()}): choose other limits, or give longer text"
        )
    if not len(packed):
        raise UserError(
            f"data.seq_len={cfg.seq_len} is longer than all the {part} text, {span.lengths[span.keep].sum()} tokens in "
            f"{span.keep.sum()} rows: lower data.seq_len, use data.packing=contiguous, or give more {part} data"
        )
    return packed


def _source_counts(tables: Sequence[TokenTable], spans: Sequence[_Span]) -> dict[str, int]:
    skipped: Counter[str] = Counter()
    for table in tables:
        skipped.update(table.skipped)
    for span in spans:
        skipped.update(span.left_out)
    reasons = {f"skipped/{reason}": number for reason, number in sorted(skipped.items())}
    return {"rows_read": sum(table.rows for table in tables), "rows_skipped": skipped.total(), **reasons}
