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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.packing import PackedRows, gather, pack
from trenchcoat.data.samples import BadSample, Segment, encode, segments
from trenchcoat.data.sources import (
    Source,
    UnreadableRow,
    dataset_source,
    dataset_splits,
    embedded_source,
    file_source,
    is_file_path,
    is_text_path,
    split_text_source,
)
from trenchcoat.data.table import TableBuilder, TokenTable, load_table, save_table

Batch = dict[str, Tensor]
Part = Literal["train", "validation"]

TEXT_HELD_OUT = 0.05
"""Share of a plain-text document held out from its end when ``data.validation_fraction`` is null."""
_VERSION = 1
"""Part of the cache key: raise it when the same source and settings come to give other tokens."""
_CHUNK_ROWS, _CHUNK_CHARACTERS = 1024, 2_000_000


@dataclass(frozen=True)
class _Part:
    """The training or the validation rows."""

    table: TokenTable
    packed: PackedRows


class Batches:
    """Batches by index, in an order that only the seed decides.

    Training rows come from an endless stream: one permutation of all rows after another, each seeded by
    (seed, epoch). Batch ``index`` is rows ``index * b`` to ``(index + 1) * b`` of that stream, so every batch is full
    and resuming needs nothing but the index.
    """

    def __init__(
        self, parts: dict[Part, _Part], *, seq_len: int, batch_size: int, seed: int, pad: int, fingerprint: str
    ) -> None:
        self._parts = parts
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.seq_len, self.batch_size, self.seed, self._pad = seq_len, batch_size, seed, pad
        self.fingerprint = fingerprint
        """Hash of the tokens and their division into rows (not of batch size and seed)."""
        self.counts = _counts(parts)
        """rows_read, skipped_rows and skipped/<reason>, then per part: rows, tokens, tokens_cut (left over at the end
        of the stream), rows_masked (dropped: no label counts)."""

    def __len__(self) -> int:
        """Micro-batches of one epoch."""
        return math.ceil(self.rows("train") / self.batch_size)

    def rows(self, split: Part) -> int:
        """Rows of ``train`` or ``validation``."""
        return len(self._parts[split].packed.starts)

    def train_batch(self, index: int) -> Batch:
        """Training batch ``index`` >= 0, over as many epochs as it takes; [b, T]."""
        rows = self.rows("train")
        chosen = [
            self._order(position // rows)[position % rows]
            for position in range(index * self.batch_size, (index + 1) * self.batch_size)
        ]
        return self._gather("train", np.array(chosen))

    def validation(self, limit: int | None = None) -> Iterator[Batch]:
        """The validation rows in their own order, at most ``limit`` batches; the last one may have fewer rows."""
        starts = range(0, self.rows("validation"), self.batch_size)
        for start in itertools.islice(starts, limit):
            stop = min(start + self.batch_size, self.rows("validation"))
            yield self._gather("validation", np.arange(start, stop))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.rows("train"))
        return self._orders[epoch]

    def _gather(self, split: Part, chosen: NDArray[np.int64]) -> Batch:
        part = self._parts[split]
        return gather(part.table.tokens, part.table.counted, part.packed, chosen, self.seq_len, self._pad)


def load_batches(cfg: DataConfig, tokenizer: Any, *, batch_size: int, seed: int) -> Batches:
    """Batches of ``batch_size`` rows of ``cfg.seq_len`` tokens, tokenized now or read from the cache.

    Validation rows are, in this order of preference: ``validation_path``; the ``validation`` split of a data set;
    the first ``validation_rows`` rows, or the first ``validation_fraction`` of them; of a ``.txt`` file its end.
    Raises ``UserError`` for data that is missing, empty, broken, of another schema, or too small.
    """
    _check(cfg, batch_size, seed)
    train, validation, held = _sources(cfg)
    limit = cfg.max_rows
    if validation is None and limit is not None:
        limit = limit + held if cfg.validation_fraction is None else math.ceil(limit / (1 - cfg.validation_fraction))
    key, table = _table(train, cfg, tokenizer, limit)
    if validation is not None:
        other_key, other = _table(validation, cfg, tokenizer, None)
        ranges = {"train": (table, 0, table.rows), "validation": (other, 0, other.rows)}
    else:
        if cfg.validation_fraction is not None and not is_text_path(cfg.path):
            held = max(1, round(table.rows * cfg.validation_fraction))
        if table.rows <= held:
            raise UserError(
                f"{train.name} has {table.rows} rows, too few to hold out {held} for validation and train on the "
                "rest: set data.validation_fraction=0.1, a smaller data.validation_rows, or data.validation_path"
            )
        other_key, ranges = str(held), {"train": (table, held, table.rows), "validation": (table, 0, held)}
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Batches(
        {part: _packed(part, cfg, *span) for part, span in ranges.items()},  # type: ignore[misc]
        seq_len=cfg.seq_len,
        batch_size=batch_size,
        seed=seed,
        pad=pad,
        fingerprint=_hash(key, other_key, cfg.packing, cfg.seq_len),
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


def _sources(cfg: DataConfig) -> tuple[Source, Source | None, int]:
    """Training source, validation source (None: hold rows out of the first) and the number of rows to hold out."""
    validation = None
    if cfg.validation_path is not None:
        validation = _validation_source(cfg.validation_path, cfg)
    if cfg.path == "embedded":
        return embedded_source("train"), validation or embedded_source("validation"), 0
    if is_text_path(cfg.path) and validation is None:
        return split_text_source(cfg.path, cfg.validation_fraction or TEXT_HELD_OUT), None, 1
    if is_file_path(cfg.path):
        return file_source(cfg.path), validation, cfg.validation_rows
    splits = dataset_splits(cfg.path, cfg.subset)
    if validation is None and "validation" in splits and cfg.split != "validation":
        validation = dataset_source(cfg.path, splits, "validation")
    return dataset_source(cfg.path, splits, cfg.split), validation, cfg.validation_rows


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
        save_table(path, table)
    return key, table


def _tokenize(source: Source, cfg: DataConfig, tokenizer: Any, limit: int | None) -> TokenTable:
    builder = TableBuilder()
    chunk: list[list[Segment]] = []
    first_problem = f"{source.name} has no rows"

    def flush() -> None:
        encoded = iter(encode(tokenizer, [sample for sample in chunk if sample], eos=cfg.eos))
        for sample in chunk:
            if sample:
                builder.add(*next(encoded))
            else:
                builder.skip()
        chunk.clear()

    characters = 0
    for where, row in itertools.islice(source.rows(), limit):
        try:
            if isinstance(row, UnreadableRow):
                raise row
            sample = segments(row, cfg, tokenizer)
        except (UnreadableRow, BadSample) as error:
            problem = f"{source.name}, {where}: {error}"
            if cfg.on_bad_row == "error":
                raise UserError(f"{problem}; mend the row, or skip such rows with data.on_bad_row=skip") from error
            if not builder.skipped:
                first_problem = f"{source.name} has no usable row; the first problem: {problem}"
            builder.skipped[error.reason] = builder.skipped.get(error.reason, 0) + 1
            sample = []
        chunk.append(sample)
        characters += sum(len(text) for text, _ in sample)
        if len(chunk) >= _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            flush()
            characters = 0
    flush()
    if not builder.tokens:
        raise UserError(first_problem)
    return builder.table()


def _packed(part: str, cfg: DataConfig, table: TokenTable, first: int, stop: int) -> _Part:
    offsets = table.offsets[first : stop + 1]
    packed = pack(offsets, table.counted, seq_len=cfg.seq_len, contiguous=cfg.packing == "contiguous")
    if len(packed.starts) == 0:
        total = int(offsets[-1] - offsets[0])
        if packed.masked:
            raise UserError(
                f"no {part} row has a label that counts ({packed.masked} rows of {cfg.seq_len} tokens, all masked): "
                "set data.mask_prompt=false, or give rows with answers"
            )
        raise UserError(
            f"data.seq_len={cfg.seq_len} is longer than all the {part} text, {total} tokens in {stop - first} rows: "
            f"lower data.seq_len, use data.packing=contiguous, or give more {part} data"
        )
    return _Part(table, packed)


def _counts(parts: dict[Part, _Part]) -> dict[str, int]:
    tables = {id(part.table): part.table for part in parts.values()}.values()
    counts = {"rows_read": sum(table.rows for table in tables), "skipped_rows": 0}
    for table in tables:
        for reason, number in table.skipped.items():
            counts["skipped_rows"] += number
            counts[f"skipped/{reason}"] = counts.get(f"skipped/{reason}", 0) + number
    for name, part in parts.items():
        counts[f"{name}/rows"] = len(part.packed.starts)
        counts[f"{name}/tokens"] = part.packed.tokens
        counts[f"{name}/tokens_cut"] = part.packed.cut
        counts[f"{name}/rows_masked"] = part.packed.masked
    return counts
