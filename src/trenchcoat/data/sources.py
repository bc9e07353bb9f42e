"""Where rows come from: local files, hub data sets and folders through ``datasets``, and the embedded text.

A source yields ``(where, row)``: ``where`` names the row for messages ("line 12"), ``row`` is a mapping of columns,
or a ``UserError`` for one that could not be read, so that the caller decides whether to stop or to skip it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trenchcoat.config import UserError
from trenchcoat.data.files import FILE_KINDS, check_file, csv_rows, data_files, data_kind, is_compressed, open_data
from trenchcoat.models.embedded import Split, stdlib_documents

SAMPLE_SEED = 42
"""Seed of the rows that ``path[N]`` takes: the same in every run, whatever ``run.seed`` is, so that runs are comparable
and share the token cache."""

Row = Mapping[str, Any] | UserError


@dataclass(frozen=True)
class Source:
    """Rows that can be read repeatedly, with a hash of their content."""

    name: str
    """For messages."""
    fingerprint: str
    """Changes when the content does."""
    rows: Callable[[], Iterator[tuple[str, Row]]]
    """A fresh pass over all rows."""
    count: Callable[[], int] | None = None
    """Number of rows, where it is known without a pass."""


def subsampled(source: Source, rows: int | None) -> Source:
    """``rows`` of a source, drawn without replacement by ``SAMPLE_SEED``, in the source's order; None or more than it
    has: all of them."""
    if rows is None:
        return source

    def chosen() -> Iterator[tuple[str, Row]]:
        """The drawn rows, in their order."""
        total = source.count() if source.count is not None else sum(1 for _ in source.rows())
        if total <= rows:
            yield from source.rows()
            return
        drawn = np.random.default_rng(SAMPLE_SEED).choice(total, rows, replace=False, shuffle=False)
        wanted = iter(np.sort(drawn).tolist())
        following = next(wanted)
        for number, row in enumerate(source.rows()):
            if number == following:
                yield row
                following = next(wanted, -1)
                if following < 0:
                    return

    return Source(f"{source.name}[{rows}]", f"{source.fingerprint} {rows} {SAMPLE_SEED}", chosen)


def embedded_source(split: Split) -> Source:
    """The standard library's source, one document a module; raises ``UserError`` when the interpreter has none."""
    try:
        documents = [text for _, text in stdlib_documents(split)]
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    digest = hashlib.sha256()
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return Source(
        f"the embedded text ({split})",
        digest.hexdigest(),
        lambda: ((f"document {i}", {"text": text}) for i, text in enumerate(documents, 1)),
    )


def file_source(path: str) -> Source:
    """The rows of a local file, or of all files that match a pattern, in the order of names; a ``.txt`` file is one
    row.

    Raises ``UserError`` for a file that is missing, empty, of an unknown kind, or broken as a whole.
    """
    files = data_files(path)
    if files == [Path(path)]:
        return _one_file(files[0])
    parts = [_one_file(file) for file in files]

    def rows() -> Iterator[tuple[str, Row]]:
        """The rows of all files."""
        for part in parts:
            for where, row in part.rows():
                yield f"{part.name}, {where}", row

    mark = hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Source(path, mark, rows)


def _one_file(file: Path) -> Source:
    kind, path = data_kind(file), str(file)
    if kind not in FILE_KINDS or (kind == ".parquet" and is_compressed(file)):
        raise UserError(
            f"{path}: files of kind {file.suffix.lower() or '(no suffix)'!r} are not read; use {', '.join(FILE_KINDS)}"
            " (text also as .gz, .bz2, .xz or .zst)"
        )
    if kind == ".txt":
        text = _text_of(path)
        return Source(path, _sha256(file), lambda: iter([("the document", {"text": text})]))
    readers = {
        ".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": csv_rows, ".tsv": csv_rows,
    }  # fmt: skip
    check_file(file)
    count = {".jsonl": lambda: _count_lines(file), ".parquet": lambda: _count_parquet(file)}.get(kind)
    return Source(path, _sha256(file), lambda: readers[kind](file), count)


def split_text_source(path: str, share: float) -> Source:
    """A ``.txt`` file as two rows: first its last ``share`` (from the next line start), then the text before."""
    text = _text_of(path)
    cut = text.find("\n", max(0, round(len(text) * (1 - share)) - 1)) + 1
    if not text[:cut].strip() or not text[cut:].strip():
        raise UserError(
            f"{path}: the last {share:.0%} of the text cannot be held out at a line break ({len(text)} characters); "
            "give data.validation_path, another data.validation_fraction, or a longer text"
        )
    rows = [("the held-out end", {"text": text[cut:]}), ("the text", {"text": text[:cut]})]
    return Source(path, f"{_sha256(Path(path))} {share}", lambda: iter(rows))


def dataset_splits(path: str, subset: str | None) -> Mapping[str, Any]:
    """Splits by name of a hub data set or a local folder, through ``datasets``; raises ``UserError``."""
    import datasets

    with dataset_errors(path):
        loaded = datasets.load_from_disk(path) if is_saved(path) else datasets.load_dataset(path, subset)
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def is_saved(path: str) -> bool:
    """Whether ``path`` is a folder that ``datasets`` has saved."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


@contextmanager
def dataset_errors(path: str) -> Iterator[None]:
    """Turn errors of ``datasets`` inside the block into a ``UserError`` that names the path."""
    import datasets

    try:
        yield
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise UserError(
            f"cannot read data.path={path!r} (neither a file here nor loadable as a folder or hub data set): {reason}"
        ) from error


def split_of(path: str, splits: Mapping[str, Any], split: str) -> Any:
    """One split of a data set; raises ``UserError`` when there is no such split."""
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(splits)}: set data.split to one of them")
    return splits[split]


def dataset_source(path: str, splits: Mapping[str, Any], split: str) -> Source:
    """One split of a loaded data set; raises ``UserError`` when there is no such split."""
    rows = split_of(path, splits, split)
    return Source(
        f"{path} ({split})",
        rows._fingerprint,  # the library has no public name for it
        lambda: _numbered(path, rows),
        lambda: len(rows),
    )


def _numbered(path: str, rows: Any) -> Iterator[tuple[str, Row]]:
    with dataset_errors(path):
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _decode(content: bytes, offset: int = 0) -> str:
    """UTF-8 text of ``content``, which starts at byte ``offset`` of its file; a byte-order mark is dropped."""
    bare = content.removeprefix(codecs.BOM_UTF8)
    try:
        return bare.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = offset + len(content) - len(bare) + error.start
        raise UserError(
            f"not UTF-8 at byte {byte} (0x{bare[error.start]:02x}); "
            "convert the file, for example with: iconv -f latin1 -t utf-8"
        ) from error


def _text_of(path: str) -> str:
    file = Path(path)
    check_file(file)
    try:
        with open_data(file) as stream:
            content = stream.read()
        text = _decode(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not text.strip():
        raise UserError(f"the data file {path} holds nothing but white space")
    return text


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """A JSON list of objects, or (as many ``.json`` files are) one object a line."""
    with open_data(file) as stream:
        first_line = stream.readline()
    if isinstance(json_line(first_line, 0), dict):
        yield from _jsonl_rows(file)
        return
    text = _text_of(str(file))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); the file is truncated "
            "or broken there, get it again or fix that line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} holds JSON that cannot be read ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{file} holds a JSON {type(rows).__name__}; expected a list of objects, or one object a line")
    for i, row in enumerate(rows, 1):
        yield f"row {i}", _object(row)


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Row]]:
    offset = 0
    with open_data(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"line {number}", json_line(line, offset)
            offset += len(line)


def _count_lines(file: Path) -> int:
    with open_data(file) as stream:
        return sum(1 for line in stream if line.strip())


def json_line(line: bytes, offset: int) -> Row:
    """The row that one line of JSON, at byte ``offset`` of its file, holds."""
    try:
        return _object(json.loads(_decode(line, offset)))
    except json.JSONDecodeError as error:
        return UserError(f"not valid JSON (column {error.colno}: {error.msg})")
    except UserError as error:
        return error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        return UserError(f"JSON that cannot be read ({error})")


def _object(row: object) -> Row:
    if isinstance(row, dict):
        return row
    return UserError(f"expected an object with columns, found a JSON {type(row).__name__}")


def _count_parquet(file: Path) -> int:
    import pyarrow.parquet

    with parquet_errors(file), pyarrow.parquet.ParquetFile(file) as table:
        return int(table.metadata.num_rows)


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    number = 0
    with parquet_errors(file), pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=1024):
            for row in batch_rows(batch):
                number += 1
                yield f"row {number}", row


def batch_rows(batch: Any) -> list[Row]:
    """The rows of an Arrow batch; one that cannot be read (text that is not UTF-8, a date beyond the calendar) is a
    ``UserError``."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [UserError(f"a value that cannot be read ({error})")]
        return [row for i in range(len(batch)) for row in batch_rows(batch.slice(i, 1))]


@contextmanager
def parquet_errors(file: Path) -> Iterator[None]:
    """Turn errors inside the block into a ``UserError`` that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a readable Parquet file ({' '.join(str(error).split())})") from error
