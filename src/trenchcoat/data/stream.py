"""Training batches from a stream: nothing is read before it is needed, and there is no token table.

Micro-batch ``i`` comes from shard ``i % V`` of the source's V shards and is that shard's batch number ``i // V``. Its
content depends on the data, the settings and the seed, not on the process: process r of W, which requests i = r, r + W,
..., reads only the shards r, r + W, ... where W divides V, and otherwise V / gcd(V, W) shards, shared with others.

A shard is read block by block. A block is as many whole samples as give a minimum of text; it is tokenized at once,
packed after the tokens left over from the previous block, and its rows are shuffled by (seed, shard, pass, block). When
a shard ends, it starts over with another shuffle. So the state between two blocks is small (a position in the source
and less than a row of tokens); it is saved to disk every few blocks, and any batch can be rebuilt from the last saved
state before it.

Shapes: b rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.batches import Batch, Batches
from trenchcoat.data.packing import Encoded, PackedRows, pack, padded_batch
from trenchcoat.data.samples import BadSample, Segment
from trenchcoat.data.sources import Row
from trenchcoat.data.stream_sources import SHARD_COUNTS, RowReader, StreamSource
from trenchcoat.data.tokens import (
    cache_folder,
    content_hash,
    encode_samples,
    read_samples,
    sample_settings,
    tokenizer_hash,
    unwanted_lengths,
)
from trenchcoat.models.embedded import Split
from trenchcoat.runtime.files import CorruptFileError, SaveError
from trenchcoat.runtime.sealed import read_sealed, write_sealed

ENDLESS = sys.maxsize
"""Length of a stream, in micro-batches and in rows."""
BATCHES_AHEAD = 8
"""Micro-batches prefetched in the background."""
BLOCK_CHARACTERS, BLOCK_ROWS = 1 << 16, 16
"""Least text of a block, in characters and in rows of T tokens (at four characters a token), with the most shards."""
NOTE_EVERY, NOTES_KEPT = 4, 16
"""Blocks between two saved states of a shard; how many of them are kept."""
_VERSION = 2


class EmptyShard(UserError):
    """A shard holds no row that can be trained on."""


@dataclass(frozen=True)
class _Place:
    """The state of a shard between two blocks; what is saved to disk."""

    rows: int = 0
    """Packed rows yielded so far."""
    turn: int = 0
    """Passes over the shard that are finished."""
    block: int = 0
    """Blocks of this pass that are finished."""
    position: Any = None
    """Position of the reader; None: the start."""
    ids: tuple[int, ...] = ()
    """Tokens left over, fewer than T."""
    counted: tuple[bool, ...] = ()
    """Whether they count in the labels."""


class _Notes:
    """Saved states of one shard on disk; the oldest are dropped."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.places = self._read()

    def _read(self) -> list[_Place]:
        try:
            kept = read_sealed(self.path, "the stream is read again")
            if kept["key"] != self.key:
                return []
            found = [_Place(**place) for place in kept["places"]]
            return [
                _Place(p.rows, p.turn, p.block, p.position, tuple(p.ids), tuple(map(bool, p.counted))) for p in found
            ]
        except (FileNotFoundError, NotADirectoryError, CorruptFileError, KeyError, TypeError):
            return []

    def best(self, row: int) -> _Place:
        """The last state at or before ``row``."""
        return max((place for place in self.places if place.rows <= row), key=lambda p: p.rows, default=_Place())

    def add(self, place: _Place) -> None:
        """Save a state; a failed write is only a warning, since everything can be read again."""
        others = [old for old in self.places if old.rows != place.rows]
        self.places = [*others[-NOTES_KEPT + 1 :], place]
        try:
            write_sealed(self.path, {"key": self.key, "places": [asdict(place) for place in self.places]})
        except SaveError as error:
            warnings.warn(f"the position in the stream is not saved, set data.cache_dir: {error}", stacklevel=2)


class _ShardRows:
    """The endless packed rows of one shard, by index."""

    def __init__(
        self, source: StreamSource, shard: int, cfg: DataConfig, tokenizer: Any, *, seed: tuple[int, int], notes: _Notes
    ) -> None:
        self.source, self.shard, self.cfg, self.tokenizer = source, shard, cfg, tokenizer
        self.seed, self.notes = seed, notes
        least = max(BLOCK_CHARACTERS, 4 * BLOCK_ROWS * cfg.seq_len)
        self.block_characters = least * SHARD_COUNTS[-1] // source.shards
        self.counts: Counter[str] = Counter()
        self.first_problem = ""
        self._go_to(_Place())

    def _go_to(self, place: _Place) -> None:
        self.place = place
        self.pending: deque[Encoded] = deque()
        self.first = place.rows
        self._reader: RowReader | None = None
        self._samples: Iterator[tuple[str, list[Segment] | BadSample]] = iter(())
        self._fruitless = self._tokens_of_turn = self._rows_of_turn = 0
        self._whole_turn = False

    def rows(self, first: int, count: int) -> list[Encoded]:
        """Rows ``first`` to ``first + count``; raises ``EmptyShard`` when the shard has none."""
        note = self.notes.best(first)
        if first < self.first or note.rows > self.place.rows:
            self._go_to(note)
        while self.first + len(self.pending) < first + count:
            self._next_block()
            self._drop(first)
        self._drop(first)
        return [self.pending[i] for i in range(count)]

    def _drop(self, first: int) -> None:
        while self.pending and self.first < first:
            self.pending.popleft()
            self.first += 1

    def _next_block(self) -> None:
        place = self.place
        if self._reader is None:
            self._reader = self.source.open(self.shard, place.position)
            self._samples = read_samples(self.source.name, self._counted(self._reader), self.cfg, self.tokenizer)
            self._tokens_of_turn = self._rows_of_turn = 0
            self._whole_turn = place.position is None
        samples, ended = self._take()
        encoded: list[Encoded] = []
        for row in encode_samples(self.source.name, samples, self.cfg, self.tokenizer):
            if isinstance(row, BadSample):
                self._note(row)
            else:
                encoded.append(row)
        lengths = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
        wanted = lengths > 0
        for reason, unwanted in unwanted_lengths(lengths, self.cfg).items():
            wanted &= ~unwanted
            self.counts[f"skipped/{reason}"] += int(unwanted.sum())
        chosen = [sample for sample, keep in zip(encoded, wanted, strict=True) if keep]
        rows, rest = self._pack(chosen)
        order = np.random.default_rng([*self.seed, place.turn, place.block]).permutation(len(rows))
        self.pending.extend(rows[i] for i in order)
        fresh = sum(len(ids) for ids, _ in chosen)
        self._fruitless = 0 if rows else self._fruitless + fresh
        self._tokens_of_turn += fresh
        self._rows_of_turn += len(rows)
        self._move_on(len(rows), rest, ended)

    def _move_on(self, rows: int, rest: Encoded, ended: bool) -> None:
        """Set the state to the end of the block just made."""
        before, reader = self.place, self._reader
        if ended:
            fruitless = self._tokens_of_turn == 0 or self._fruitless > 2 * self.cfg.seq_len
            if self._whole_turn and self._rows_of_turn == 0 and fruitless:
                raise EmptyShard(f"{self.source.name}: no usable row in shard {self.shard}{self.first_problem}")
            self._reader = None
        self.place = _Place(
            rows=before.rows + rows,
            turn=before.turn + ended,
            block=0 if ended else before.block + 1,
            position=None if ended or reader is None else reader.position,
            ids=tuple(rest[0].tolist()),
            counted=tuple(rest[1].tolist()),
        )
        if self.place.block % NOTE_EVERY == 0:
            self.notes.add(self.place)

    def _counted(self, reader: RowReader) -> Iterator[tuple[str, Row]]:
        for row in reader:
            self.counts["rows_read"] += 1
            yield row

    def _note(self, bad: BadSample) -> None:
        self.counts[f"skipped/{bad.reason}"] += 1
        self.first_problem = self.first_problem or f"; the first problem: {bad}"

    def _take(self) -> tuple[list[tuple[str, list[Segment]]], bool]:
        """Samples of one block, and whether the shard ended with it."""
        samples: list[tuple[str, list[Segment]]] = []
        characters = 0
        for where, sample in self._samples:
            if isinstance(sample, BadSample):
                self._note(sample)
                continue
            samples.append((where, sample))
            characters += sum(len(text) for text, _ in sample)
            if characters >= self.block_characters:
                return samples, False
        return samples, True

    def _pack(self, samples: list[Encoded]) -> tuple[list[Encoded], Encoded]:
        """(rows, tokens left over) of the previous left-over tokens and ``samples``."""
        contiguous = self.cfg.packing == "contiguous"
        carried = (np.array(self.place.ids, dtype=np.int32), np.array(self.place.counted, dtype=np.bool_))
        parts = [carried, *samples]
        ids, counted = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        offsets = np.concatenate([[0], np.cumsum([len(p[0]) for p in parts])])
        packed = pack(ids, counted, offsets, seq_len=self.cfg.seq_len, contiguous=contiguous)
        self.counts["train/rows_masked"] += packed.rows_masked
        left = len(ids) if contiguous else len(ids) - len(ids) % self.cfg.seq_len
        return [packed.row(i) for i in range(len(packed))], (ids[left:], counted[left:])


class StreamedBatches(Batches):
    """Batches by index from a stream, prefetched in a background thread once they are requested at a steady stride.

    ``len`` and ``rows("train")`` are ``ENDLESS``: training must be given a number of steps. ``counts`` are those of
    what this process has read so far.
    """

    def __init__(
        self,
        source: StreamSource,
        cfg: DataConfig,
        tokenizer: Any,
        *,
        validation: PackedRows,
        batch_size: int,
        seed: int,
        pad: int,
        validation_key: str,
        source_counts: dict[str, int],
    ) -> None:
        packing = (cfg.seq_len, cfg.packing, cfg.min_tokens, cfg.max_tokens)
        how = (BLOCK_CHARACTERS, BLOCK_ROWS, source.shards)
        rows_key = content_hash(
            _VERSION, source.fingerprint, tokenizer_hash(tokenizer), *sample_settings(cfg), packing, how
        )
        super().__init__(
            {"validation": validation},
            batch_size=batch_size,
            seed=seed,
            pad=pad,
            fingerprint=content_hash(rows_key, validation_key),
            source_counts=source_counts,
        )
        self.shards = source.shards
        """V: micro-batch i comes from shard i % V."""
        self.name = source.name
        self._source, self._cfg = source, cfg
        self._tokenizer = copy.deepcopy(tokenizer)  # the background thread needs its own
        self._notes = cache_folder(cfg) / "streams" / content_hash(rows_key, seed)
        self._notes_key = rows_key
        self._rows: dict[int, _ShardRows] = {}
        self._empty: set[int] = set()
        self._problem = ""
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "trenchcoat-stream")
        self._ahead: dict[int, Future[Batch]] = {}
        self._last: int | None = None

    def __len__(self) -> int:
        """A stream has no end."""
        return ENDLESS

    def rows(self, split: Split) -> int:
        """Rows of ``validation``; of ``train``, there is no end."""
        return ENDLESS if split == "train" else super().rows(split)

    @property
    def counts(self) -> dict[str, int]:
        """As in ``Batches``, but of the training rows that this process has read so far."""
        found = Counter(self._counts)
        with self._lock:
            for shard in self._rows.values():
                found.update(shard.counts)
                skipped = [number for name, number in shard.counts.items() if name.startswith("skipped/")]
                found["rows_skipped"] += sum(skipped)
        return dict(found)

    def train_rows(self, index: int) -> list[int]:
        """IDs of the rows of training batch ``index`` [b]; in a stream no ID repeats."""
        return list(range(index * self.batch_size, (index + 1) * self.batch_size))

    def train_batch(self, index: int) -> Batch:
        """Training batch ``index`` >= 0; [b, T]."""
        if index not in self._ahead:
            self._forget()
            self._ahead[index] = self._thread.submit(self._make, index)
        batch = self._ahead.pop(index).result()
        if self._last is not None and index > self._last:
            step = index - self._last
            for wanted in range(index + step, index + (BATCHES_AHEAD + 1) * step, step):
                if wanted not in self._ahead:
                    self._ahead[wanted] = self._thread.submit(self._make, wanted)
        self._last = index
        return batch

    def close(self) -> None:
        """Stop the background thread."""
        self._forget()
        self._thread.shutdown()

    def _forget(self) -> None:
        for job in self._ahead.values():
            job.cancel()
        self._ahead.clear()

    def _make(self, index: int) -> Batch:
        slot, number = index % self.shards, index // self.shards
        with self._lock:
            for shard in (*range(slot, self.shards), *range(slot)):
                if shard in self._empty:
                    continue
                try:
                    rows = self._shard(slot, shard).rows(number * self.batch_size, self.batch_size)
                except EmptyShard as error:
                    del self._rows[slot]
                    self._empty.add(shard)
                    self._problem = self._problem or str(error)
                    continue
                return padded_batch(rows, self._cfg.seq_len, self._pad)
        raise UserError(f"none of the {self.shards} shards of the stream can be trained on; {self._problem}")

    def _shard(self, slot: int, shard: int) -> _ShardRows:
        """The rows of ``slot``: those of its own shard, or of the next one that is not empty."""
        if slot not in self._rows:
            notes = _Notes(self._notes / f"{slot}-{shard}.json", f"{self._notes_key} {self.seed}")
            self._rows[slot] = _ShardRows(
                self._source, shard, self._cfg, self._tokenizer, seed=(self.seed, slot), notes=notes
            )
        return self._rows[slot]
