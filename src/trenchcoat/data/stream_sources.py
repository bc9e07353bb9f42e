"""The sources of a stream, split into shards, each of which can be read from any of its rows on.

Shards depend on the source alone, never on the number of processes, so that every process agrees on them:

* JSON lines: equal ranges of bytes of all files together; a line belongs to the shard in which it begins;
* Parquet: runs of whole row groups of all files together;
* a data set saved by ``datasets`` (memory-mapped): equal ranges of rows;
* a hub data set, or a folder of another kind: its own files, through ``datasets`` (``streaming=True``).

A process opens only the shards it needs. Their number is the largest of ``SHARD_COUNTS`` that the source is big enough
for; most numbers of processes divide one of those.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trenchcoat.config import DataConfig, UserError
from trenchcoat.data.files import check_file, data_files, is_file_path, split_sample
from trenchcoat.data.sources import (
    Row,
    Source,
    batch_rows,
    dataset_errors,
    dataset_splits,
    is_saved,
    json_line,
    parquet_errors,
    split_of,
)

SHARD_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192)
SHARD_BYTES, SHARD_ROWS = 1 << 20, 1024
"""Least size of a shard of JSON lines, and of a saved data set."""
_PROBE = 1 << 16
"""Bytes of the start, middle and end of a file that its fingerprint covers."""


class RowReader(Protocol):
    """Rows of a shard, in order."""

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """(where, row) as a ``Source`` gives them."""

    @property
    def position(self) -> Any:
        """The position after the last row, as plain JSON."""


@dataclass(frozen=True)
class StreamSource:
    """A source in shards."""

    name: str
    """For messages."""
    fingerprint: str
    """Changes when the content does, as far as sizes and samples of it show."""
    shards: int
    """How many."""
    open: Callable[[int, Any], RowReader]
    """(shard, position or None for its beginning) -> reader."""


def open_stream(cfg: DataConfig) -> tuple[StreamSource, Source]:
    """The training rows as a stream, and the rows held out from it (or its ``validation`` split).

    Raises ``UserError`` for what cannot be streamed or is too small.
    """
    path, sample = split_sample(cfg.path)
    if sample is not None or path == "embedded" or Path(path).suffix.lower() == ".txt":
        raise UserError(
            f"data.path={cfg.path} cannot be streamed: data.streaming reads JSON lines, Parquet, folders and hub data "
            "sets as a whole; drop data.streaming, it is for data larger than memory"
        )
    hold = cfg.validation_rows if cfg.validation_path is None else 0
    if is_file_path(path):
        return _file_stream(data_files(path), path, hold)
    if is_saved(path):
        return _saved_stream(path, cfg.split, hold)
    return _dataset_stream(path, cfg, hold)


def most_shards(size: int) -> int:
    """The largest of ``SHARD_COUNTS`` that is at most ``size``; at least 1."""
    return SHARD_COUNTS[max(0, bisect.bisect_right(SHARD_COUNTS, size) - 1)]


def _file_stream(files: Sequence[Path], name: str, hold: int) -> tuple[StreamSource, Source]:
    for file in files:
        check_file(file)
    kinds = sorted({file.suffix.lower() for file in files})
    kind = kinds[0]
    if len(kinds) > 1 or kind not in (".json", ".jsonl", ".parquet"):
        raise UserError(
            f"{name}: files of kind {' and '.join(map(repr, kinds))} are not streamed; use .jsonl or .parquet, not "
            "compressed (a stream starts anywhere in a file)"
        )
    space: _Space = _Groups(files, hold) if kind == ".parquet" else _Lines(files, hold)
    if space.held < hold or space.empty:
        raise _too_few(name, f"no more than {space.held}", hold)
    mark = _files_fingerprint(files)
    held = Source(
        f"the first {hold} rows of {name}", f"{mark} first {hold}", lambda: itertools.islice(space.all(), hold)
    )
    return StreamSource(name, f"{mark} from {hold}", space.shards, space.open), held


def _too_few(name: str, rows: str, hold: int) -> UserError:
    return UserError(
        f"{name} has {rows} rows, too few to hold out {hold} for validation and train on the rest: set a smaller "
        "data.validation_rows, or data.validation_path"
    )


def _files_fingerprint(files: Iterable[Path]) -> str:
    """Hash of the files' sizes and of three samples of each: a terabyte need not be read first."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for place in (0, size // 2, max(0, size - _PROBE)):
                stream.seek(place)
                digest.update(stream.read(_PROBE))
    return digest.hexdigest()


class _Space:
    """Files as one space of positions (bytes or rows), cut into shards."""

    starts: list[int]
    """Where each part of the space (a file or a row group) starts, and its end."""
    cuts: list[int]
    """Where each shard starts, and the end."""
    shards: int
    held: int
    """Rows before the first shard."""
    empty: bool
    """Whether no rows are left for the shards."""

    def read(self, part: int, position: int, stop: int) -> Iterator[tuple[int, str, Row]]:
        """(position after the row, where, row) of the rows of a part that begin from ``position`` to ``stop``."""
        raise NotImplementedError

    def open(self, shard: int, position: Any) -> RowReader:
        """The rows of a shard."""
        return _SpaceReader(self, self.cuts[shard] if position is None else int(position), self.cuts[shard + 1])

    def all(self) -> _SpaceReader:
        """Every row."""
        return _SpaceReader(self, 0, self.starts[-1])


class _SpaceReader:
    def __init__(self, space: _Space, start: int, stop: int) -> None:
        self.space, self.position, self.stop = space, start, stop

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        starts = self.space.starts
        while self.position < self.stop:
            part = bisect.bisect_right(starts, self.position) - 1
            stop = min(self.stop, starts[part + 1])
            for after, where, row in self.space.read(part, self.position, stop):
                self.position = after
                yield where, row
            self.position = max(self.position, stop)


class _Lines(_Space):
    """Files of JSON lines as one space of bytes."""

    def __init__(self, files: Sequence[Path], hold: int) -> None:
        self.files = files
        self.starts = [0, *itertools.accumulate(file.stat().st_size for file in files)]
        for file in files:
            self._refuse_list(file)
        reader = self.all()
        self.held = sum(1 for _ in itertools.islice(reader, hold))
        begin, end = reader.position, self.starts[-1]
        shards = most_shards((end - begin) // SHARD_BYTES)
        while True:
            self.cuts = [self.line_start(begin + (end - begin) * i // shards) for i in range(shards)] + [end]
            if shards == 1 or all(a < b for a, b in itertools.pairwise(self.cuts)):
                break
            shards = most_shards(shards - 1)
        self.shards = shards
        self.empty = begin >= end

    @staticmethod
    def _refuse_list(file: Path) -> None:
        with open(file, "rb") as stream:
            first = stream.readline()
        if file.suffix.lower() == ".json" and not isinstance(json_line(first, 0), dict):
            raise UserError(
                f"{file} is not one JSON object a line, so it cannot be streamed; convert it, for example with: "
                "jq -c .[] FILE.json > FILE.jsonl"
            )

    def line_start(self, place: int) -> int:
        """The first start of a line at or after ``place``."""
        number = bisect.bisect_right(self.starts, place) - 1
        if number == len(self.files) or place == self.starts[number]:
            return place
        with open(self.files[number], "rb") as stream:
            stream.seek(place - self.starts[number] - 1)
            stream.readline()
            return self.starts[number] + stream.tell()

    def read(self, part: int, position: int, stop: int) -> Iterator[tuple[int, str, Row]]:
        """Lines, blank ones left out."""
        file, base = self.files[part], self.starts[part]
        name = f"{file.name}, " if len(self.files) > 1 else ""
        with open(file, "rb") as stream:
            stream.seek(position - base)
            while position < stop:
                line = stream.readline()
                offset = position - base
                position += len(line)
                if line.strip():
                    yield position, f"{name}byte {offset}", json_line(line, offset)


class _Groups(_Space):
    """Parquet files as one space of rows, cut at row groups."""

    def __init__(self, files: Sequence[Path], hold: int) -> None:
        import pyarrow.parquet

        self.groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        for file in files:
            with parquet_errors(file), pyarrow.parquet.ParquetFile(file) as table:
                counts = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
            self.groups += [(file, i) for i, count in enumerate(counts) if count]
            sizes += [count for count in counts if count]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.held = min(hold, self.starts[-1])
        self.empty = self.starts[-1] <= hold
        first = max(0, bisect.bisect_right(self.starts, hold) - 1)
        count = len(sizes) - first
        self.shards = most_shards(count)
        self.cuts = [self.starts[first + count * i // self.shards] for i in range(self.shards)] + [self.starts[-1]]
        self.cuts[0] = max(self.cuts[0], hold)

    def read(self, part: int, position: int, stop: int) -> Iterator[tuple[int, str, Row]]:
        """Rows of one group."""
        import pyarrow.parquet

        file, group = self.groups[part]
        skip = position - self.starts[part]
        with parquet_errors(file), pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                rows = batch.slice(skip) if skip < len(batch) else batch.slice(len(batch))
                skip = max(0, skip - len(batch))
                for row in batch_rows(rows):
                    position += 1
                    yield position, f"{file.name}, row {position} of the stream", row


class _IterableReader:
    """Rows of an iterable data set, which keeps its own position."""

    def __init__(self, rows: Any, position: Any) -> None:
        self.rows = rows
        if position is not None:
            rows.load_state_dict(position)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return ((f"row {number} read", row) for number, row in enumerate(self.rows, 1))

    @property
    def position(self) -> Any:
        """The data set's own state, as plain JSON."""
        return json.loads(json.dumps(self.rows.state_dict()))


def _saved_stream(path: str, split: str, hold: int) -> tuple[StreamSource, Source]:
    """A data set saved by ``datasets``: memory-mapped, any row at once."""
    splits = dataset_splits(path, None)
    rows = split_of(path, splits, split)
    own = splits.get("validation") if split != "validation" and hold else None
    hold = hold if own is None else 0
    if len(rows) <= hold:
        raise _too_few(path, f"{len(rows)}", hold)
    shards = most_shards((len(rows) - hold) // SHARD_ROWS)
    training = rows.select(range(hold, len(rows))).to_iterable_dataset(num_shards=shards)
    held = rows.select(range(hold)) if own is None else own
    mark = f"{rows._fingerprint} {hold}"  # the library has no public name for it
    return (
        StreamSource(path, mark, shards, lambda shard, at: _IterableReader(training.shard(shards, shard), at)),
        _held_source(path, f"{mark} {held._fingerprint}", held),
    )


def _dataset_stream(path: str, cfg: DataConfig, hold: int) -> tuple[StreamSource, Source]:
    """A folder or a hub data set through ``datasets``; local JSON lines and Parquet files are read without it."""
    import datasets

    with dataset_errors(path):
        builder = datasets.load_dataset_builder(path, cfg.subset)
        found = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
        splits = builder.as_streaming_dataset()
    rows = split_of(path, splits, cfg.split)
    mark = hashlib.sha256(json.dumps([builder.hash, cfg.subset, cfg.split, found]).encode()).hexdigest()
    own = splits["validation"] if hold and cfg.split != "validation" and "validation" in splits else None
    files = [Path(file) for file in found.get(cfg.split, ())]
    local = {file.suffix for file in files} in ({".jsonl"}, {".parquet"}) and all(file.is_file() for file in files)
    if local:
        stream, held = _file_stream(files, f"{path} ({cfg.split})", hold if own is None else 0)
        return stream, held if own is None else _held_source(path, f"{mark} validation", own)
    shards = most_shards(rows.num_shards)
    skipped = 0 if own is not None else hold

    def reader(shard: int, position: Any) -> RowReader:
        """The rows of a shard, without those held out."""
        part = rows.shard(shards, shard)
        return _IterableReader(part.skip(skipped) if shard == 0 and skipped else part, position)

    held_rows = rows.shard(shards, 0).take(hold) if own is None else own
    return StreamSource(path, f"{mark} {skipped}", shards, reader), _held_source(path, f"{mark} {skipped}", held_rows)


def _held_source(path: str, fingerprint: str, rows: Iterable[Any]) -> Source:
    return Source(
        f"the validation rows of {path}",
        fingerprint,
        lambda: ((f"row {number}", row) for number, row in enumerate(rows, 1)),
    )
