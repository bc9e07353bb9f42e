"""From a source to its tokens: every row is read, bad ones are refused or counted, the rest tokenized in chunks and
cached.

Tokens are cached under a hash of everything they depend on: the source's content, the tokenizer and the settings that
make a sample out of a row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.formats import segments
from trenchcoat.data.packing import Encoded
from trenchcoat.data.samples import BadSample, Segment, encode
from trenchcoat.data.sources import Row, Source
from trenchcoat.data.table import TableBuilder, TokenTable, load_table, save_table
from trenchcoat.models.text import known_embeddings, without_embedding
from trenchcoat.runtime.files import SaveError

Say = Callable[[str], None]
"""Shows a sentence to the user."""
FIRST_REPORT, REPORT_EVERY = 1.0, 15.0
"""Seconds of tokenizing before it is told how far it is, and between later reports."""

_VERSION = 3
"""Part of the cache key: increase it when the same source and settings start to give other tokens."""
_CHUNK_ROWS, _CHUNK_CHARACTERS = 1024, 1_000_000


def content_hash(*parts: object) -> str:
    """32 hexadecimal digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what decides the tokens of a text, and which of them the model has no embedding for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.update(padding=None, truncation=None)  # set by whoever called the tokenizer last
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)
    known = known_embeddings(tokenizer)
    return content_hash(state, *marks, *(() if known is None else (known,)))


def sample_settings(cfg: DataConfig) -> tuple[Any, ...]:
    """The settings that make a sample out of a row."""
    return (cfg.format, cfg.text_column, cfg.mask_prompt, cfg.bos, cfg.eos, cfg.on_bad_row)


def cache_folder(cfg: DataConfig) -> Path:
    """The cache folder, for everything that can be recomputed from the data."""
    return Path(cfg.cache_dir) if cfg.cache_dir else Path.home() / ".cache" / "trenchcoat"


def token_table(
    source: Source, cfg: DataConfig, tokenizer: Any, limit: int | None, say: Say | None = None
) -> tuple[str, TokenTable]:
    """(cache key, tokens of the first ``limit`` rows), from the cache when it holds them undamaged.

    ``say`` is told how far tokenizing is, where it takes long.
    """
    key = content_hash(_VERSION, source.fingerprint, tokenizer_hash(tokenizer), *sample_settings(cfg), limit)
    path = cache_folder(cfg) / "tokens" / f"{key}.safetensors"
    table = load_table(path)
    if table is None:
        table = _tokenize(source, cfg, tokenizer, limit, say)
        try:
            save_table(path, table)
        except SaveError as error:  # tokens can be recomputed; warn that they will be
            warnings.warn(f"tokenized data is not cached, set data.cache_dir: {error}", stacklevel=3)
    return key, table


def read_samples(
    name: str, rows: Iterable[tuple[str, Row]], cfg: DataConfig, tokenizer: Any
) -> Iterator[tuple[str, list[Segment] | BadSample]]:
    """(where it is, segments) of every row; where bad rows are skipped, what is wrong with it instead of segments."""
    for where, row in rows:
        try:
            if isinstance(row, UserError):
                raise BadSample("unreadable", str(row))
            yield where, segments(row, cfg, tokenizer)
        except BadSample as error:
            yield where, _bad(f"{name}, {where}", error, cfg)


def encode_samples(
    name: str, samples: Sequence[tuple[str, list[Segment]]], cfg: DataConfig, tokenizer: Any
) -> list[Encoded | BadSample]:
    """The tokens of each sample (where it is, segments); where bad rows are skipped, what is wrong with it instead.

    Bad is a text that the tokenizer refuses, and one with a token that the model has no embedding for.
    """

    def encoded(chosen: Sequence[tuple[str, list[Segment]]]) -> list[Encoded]:
        """Tokens of some of them."""
        return encode(tokenizer, [segments for _, segments in chosen], bos=cfg.bos, eos=cfg.eos)

    known = known_embeddings(tokenizer)
    try:
        found: list[Encoded | BadSample] = [*encoded(samples)]
    except UserError:  # one of them: which?
        found = []
        for sample in samples:
            try:
                found += encoded([sample])
            except UserError as error:
                found.append(_bad(f"{name}, {sample[0]}", BadSample("refused by the tokenizer", str(error)), cfg))
    for i, (where, _) in enumerate(samples):
        row = found[i]
        foreign = None if isinstance(row, BadSample) else without_embedding(tokenizer, row[0].tolist(), known)
        if foreign is not None:
            found[i] = _bad(f"{name}, {where}", BadSample("token without embedding", foreign), cfg)
    return found


def _bad(where: str, error: BadSample, cfg: DataConfig) -> BadSample:
    """The bad sample with its place; raised, as a ``UserError``, where bad rows are not skipped."""
    problem = f"{where}: {error}"
    if cfg.on_bad_row == "error":
        raise UserError(f"{problem}; fix the row, or skip such rows with data.on_bad_row=skip") from error
    return BadSample(error.reason, problem)


class _Reporter:
    """Tells how many rows are read: after ``FIRST_REPORT`` seconds, and then every ``REPORT_EVERY``."""

    def __init__(self, name: str, say: Say | None) -> None:
        self.name, self.say, self.rows = name, say, 0
        self.due = time.monotonic() + FIRST_REPORT

    def row(self) -> None:
        """Count a row."""
        self.rows += 1
        if self.say is not None and time.monotonic() >= self.due:
            self.say(f"tokenizing {self.name}: {self.rows} rows so far (they are kept in data.cache_dir)")
            self.due = time.monotonic() + REPORT_EVERY


def _tokenize(source: Source, cfg: DataConfig, tokenizer: Any, limit: int | None, say: Say | None) -> TokenTable:
    builder, reporter = TableBuilder(), _Reporter(source.name, say)
    chunk: list[tuple[str, list[Segment]]] = []
    characters = 0
    for where, sample in itertools.islice(read_samples(source.name, source.rows(), cfg, tokenizer), limit):
        if isinstance(sample, BadSample):
            builder.note(sample)
            sample = []
        reporter.row()
        chunk.append((where, sample))
        characters += sum(len(text) for text, _ in sample)
        if len(chunk) >= _CHUNK_ROWS or characters >= _CHUNK_CHARACTERS:
            builder.extend(encode_samples(source.name, chunk, cfg, tokenizer))
            chunk, characters = [], 0
    builder.extend(encode_samples(source.name, chunk, cfg, tokenizer))
    if not builder.tokens:
        raise UserError(f"{source.name} has no usable row{builder.first_problem or ': it is empty'}")
    return builder.table()


def unwanted_lengths(lengths: NDArray[np.int64], cfg: DataConfig) -> dict[str, NDArray[np.bool_]]:
    """Which samples of ``lengths`` tokens [n] are dropped [n], by their category in the counts (0: no sample)."""
    found = {}
    if cfg.min_tokens is not None:
        found["too short"] = (lengths > 0) & (lengths < cfg.min_tokens)
    if cfg.max_tokens is not None:
        found["too long"] = lengths > cfg.max_tokens
    return found
