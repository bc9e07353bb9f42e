"""Training text: rows from a source, tokens by template, rows of fixed length, batches by index.

``load_batches`` is the door. Tokens are kept on disk under a hash of everything they depend on; packing, holding out
and the order of rows are arithmetic on top, so another ``seq_len`` or seed tokenizes nothing again.

Shapes: b rows of a batch, T tokens of a row (``data.seq_len``). A batch is ``input_ids``, ``attention_mask`` (0 at
padding) and ``labels`` (-100 where no loss is taken, else equal to ``input_ids``; not shifted), each int64 [b, T].
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.packing import PackedRows, pack
from trenchcoat.data.samples import BadSample, Segment, encode, segments
from trenchcoat.data.sources import (
    Source,
    dataset_source,
    dataset_splits,
    embedded_source,
    file_source,
    is_file_path,
    is_text_path,
    split_text_source,
)
from trenchcoat.data.table import TableBuilder, TokenTable, load_table, save_table
from trenchcoat.files import SaveError

Batch = dict[str, Tensor]
Part = Literal["train", "validation"]

TEXT_HELD_OUT = 0.05
"""Share of a plain-text document held out from its end when ``data.validation_fraction`` is null."""
_VERSION = 1
"""Part of the cache key: raise it when the same source and settings come to give other tokens."""
_CHUNK_ROWS, _CHUNK_CHARACTERS = 1024, 1_000_000


class Batches:
    """Batches by index, in an order that only the seed decides.

    Training rows come from an endless stream: one permutation of all rows after another, each seeded by
    (seed, epoch). Batch ``index`` is rows ``index * b`` to ``(index + 1) * b`` of that stream, so every batch is full
    and resuming needs nothing but the index.
    """

    def __init__(
        self,
        parts: dict[Part, PackedRows],
        *,
        batch_size: int,
        seed: int,
        pad: int,
        fingerprint: str,
        source_counts: dict[str, int],
    ) -> None:
        self._parts = parts
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.batch_size, self.seed, self._pad = batch_size, seed, pad
        self.fingerprint = fingerprint
        """Hash of the tokens and their division into rows (not of batch size and seed)."""
        self.counts = dict(source_counts)
        """rows_read, rows_skipped and skipped/<reason>, then per part: rows, tokens, tokens_cut (left over at the end
        of the stream), rows_masked (dropped: no label counts)."""
        for name, rows in parts.items():
            self.counts |= {
                f"{name}/rows": len(rows),
                f"{name}/tokens": int(rows.lengths.sum()),
                f"{name}/tokens_cut": rows.tokens_cut,
                f"{name}/rows_masked": rows.rows_masked,
            }

    def __len__(self) -> int:
        """Micro-batches of one epoch."""
        return math.ceil(self.rows("train") / self.batch_size)

    def rows(self, split: Part) -> int:
        """Rows of ``train`` or ``validation``."""
        return len(self._parts[split])

    def train_batch(self, index: int) -> Batch:
        """Training batch ``index`` >= 0, over as many epochs as it takes; [b, T]."""
        rows = self.rows("train")
        chosen = [
            self._order(position // rows)[position % rows]
            for position in range(index * self.batch_size, (index + 1) * self.batch_size)
        ]
        return self._parts["train"].batch(np.array(chosen), self._pad)

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        """The validation rows in their own order, at most ``limit`` batches; the last one may have fewer rows."""
        rows = np.arange(self.rows("validation"))
        for start in itertools.islice(range(0, len(rows), self.batch_size), limit):
            yield self._parts["validation"].batch(rows[start : start + self.batch_size], self._pad)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.rows("train"))
        return self._orders[epoch]


def load_batches(cfg: DataConfig, tokenizer: Any, *, batch_size: int, seed: int) -> Batches:
    """Batches of ``batch_size`` rows of ``cfg.seq_len`` tokens, tokenized now or read from the cache.

    Validation rows are, in this order of preference: ``validation_path``; the ``validation`` split of a data set;
    the first ``validation_rows`` rows, or the first ``validation_fraction`` of them; of a ``.txt`` file its end.
    Raises ``UserError`` for data that is missing, empty, broken, of another schema, or too small.
    """
    _check(cfg, batch_size, seed)
    train, validation, hold = _sources(cfg)
    limit = cfg.max_rows
    if validation is None and limit is not None:
        limit += hold if isinstance(hold, int) else max(1, round(limit * hold / (1 - hold)))
    key, table = _table(train, cfg, tokenizer, limit)
    tables = [table]
    spans: dict[Part, tuple[TokenTable, int, int]]
    if validation is not None:
        other_key, other = _table(validation, cfg, tokenizer, None)
        tables.append(other)
        spans = {"train": (table, 0, table.rows), "validation": (other, 0, other.rows)}
    else:
        held = hold if isinstance(hold, int) else max(1, round(table.rows * hold))
        if table.rows <= held:
            raise UserError(
                f"{train.name} has {table.rows} rows, too few to hold out {held} for validation and train on the "
                "rest: set data.validation_fraction=0.1, a smaller data.validation_rows, or data.validation_path"
            )
        other_key, spans = str(held), {"train": (table, held, table.rows), "validation": (table, 0, held)}
    return Batches(
        {part: _packed(part, cfg, *span) for part, span in spans.items()},
        batch_size=batch_size,
        seed=seed,
        pad=next((mark for mark in (tokenizer.pad_token_id, tokenizer.eos_token_id) if mark is not None), 0),
        fingerprint=_hash(key, other_key, cfg.packing, cfg.seq_len),
        source_counts=_source_counts(tables),
    )


def _check(cfg: DataConfig, batch_size: int, seed: int) -> None:
    share = cfg.validation_fraction
    for name, value, least in (
        ("data.seq_len", cfg.seq_len, 2),
        ("data.validation_rows", cfg.validation_rows, 1),
        ("data.max_rows", 1 if cfg.max_rows is None else cfg.max_rows, 1),
        ("batch_size", batch_size, 1),
        ("run.seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"{name}={value} is too small; it must be at least {least}")
    if share is not None and not 0 < share < 1:
        raise UserError(f"data.validation_fraction={share} must lie between 0 and 1, both excluded")


def _sources(cfg: DataConfig) -> tuple[Source, Source | None, int | float]:
    """Training source, validation source, and without the latter the rows (int) or the share (float) to hold out."""
    validation = None
    if cfg.validation_path is not None:
        validation = _validation_source(cfg.validation_path, cfg)
    if cfg.path == "embedded":
        return embedded_source("train"), validation or embedded_source("validation"), 0
    if is_text_path(cfg.path) and validation is None:
        return split_text_source(cfg.path, cfg.validation_fraction or TEXT_HELD_OUT), None, 1
    hold = cfg.validation_rows if cfg.validation_fraction is None else cfg.validation_fraction
    if is_file_path(cfg.path):
        return file_source(cfg.path), validation, hold
    splits = dataset_splits(cfg.path, cfg.subset)
    if validation is None and "validation" in splits and cfg.split != "validation":
        validation = dataset_source(cfg.path, splits, "validation")
    return dataset_source(cfg.path, splits, cfg.split), validation, hold


def _validation_source(path: str, cfg: DataConfig) -> Source:
    if path == "embedded":
        return embedded_source("validation")
    if is_file_path(path):
        return file_source(path)
    splits = dataset_splits(path, None)
    return dataset_source(path, splits, "validation" if "validation" in splits else cfg.split)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.update(padding=None, truncation=None)  # set by whoever called the tokenizer last
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return _hash(state, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)


def _table(source: Source, cfg: DataConfig, tokenizer: Any, limit: int | None) -> tuple[str, TokenTable]:
    """(cache key, tokens of the first ``limit`` rows), from the cache when it holds them undamaged."""
    settings = (cfg.format, cfg.text_column, cfg.mask_prompt, cfg.eos, cfg.on_bad_row, limit)
    key = _hash(_VERSION, source.fingerprint, _tokenizer_hash(tokenizer), *settings)
    folder = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else Path.home() / ".cache" / "trenchcoat"
    path = folder / "tokens" / f"{key}.safetensors"
    table = load_table(path)
    if table is None:
        table = _tokenize(source, cfg, tokenizer, limit)
        try:
            save_table(path, table)
        except SaveError as error:  # tokens can be made again; say why they will be
            warnings.warn(f"tokenized data is not kept, set data.cache_dir: {error}", stacklevel=3)
    return key, table


def _samples(source: Source, cfg: DataConfig, tokenizer: Any) -> Iterator[list[Segment] | BadSample]:
    """The segments of every row, or, where bad rows are skipped, what is wrong with it and where it is."""
    for where, row in source.rows():
        try:
            if isinstance(row, UserError):
                raise BadSample("unreadable", str(row))
            yield segments(row, cfg, tokenizer)
        except BadSample as error:
            problem = f"{source.name}, {where}: {error}"
            if cfg.on_bad_row == "error":
                raise UserError(f"{problem}; mend the row, or skip such rows with data.on_bad_row=skip") from error
            yield BadSample(error.reason, problem)


def _tokenize(source: Source, cfg: DataConfig, tokenizer: Any, limit: int | None) -> TokenTable:
    builder = TableBuilder()
    chunk: list[list[Segment]] = []
    characters = 0
    first_problem = ""
    for sample in itertools.islice(_samples(source, cfg, tokenizer), limit):
        if isinstance(sample, BadSample):
            first_problem = first_problem or f"; the first problem: {sample}"
            builder.skipped[sample.reason] += 1
            sample = []
        chunk.append(sample)
        characters += sum(len(text) for text, _ in sample)
        if len(chunk) >= _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            builder.extend(encode(tokenizer, chunk, eos=cfg.eos))
            chunk, characters = [], 0
    builder.extend(encode(tokenizer, chunk, eos=cfg.eos))
    if not builder.tokens:
        raise UserError(f"{source.name} has no usable row{first_problem or ': it is empty'}")
    return builder.table()


def _packed(part: Part, cfg: DataConfig, table: TokenTable, first: int, stop: int) -> PackedRows:
    offsets = table.offsets[first : stop + 1]
    packed = pack(table.tokens, table.counted, offsets, seq_len=cfg.seq_len, contiguous=cfg.packing == "contiguous")
    if packed.rows_masked and not len(packed):
        raise UserError(
            f"no {part} row has a label that counts ({packed.rows_masked} rows of at most {cfg.seq_len} tokens, all "
            "masked): set data.mask_prompt=false, raise data.seq_len, or give rows with longer answers"
        )
    if not len(packed):
        raise UserError(
            f"data.seq_len={cfg.seq_len} is longer than all the {part} text, {offsets[-1] - offsets[0]} tokens in "
            f"{stop - first} rows: lower data.seq_len, use data.packing=contiguous, or give more {part} data"
        )
    return packed


def _source_counts(tables: Sequence[TokenTable]) -> dict[str, int]:
    skipped: Counter[str] = Counter()
    for table in tables:
        skipped.update(table.skipped)
    reasons = {f"skipped/{reason}": number for reason, number in sorted(skipped.items())}
    return {"rows_read": sum(table.rows for table in tables), "rows_skipped": skipped.total(), **reasons}
