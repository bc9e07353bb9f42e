"""Local data files: which ones a path or pattern names, and how they are opened, compressed or not."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trenchcoat.config import UserError

FILE_KINDS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")


def _open_zst(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst,
}  # fmt: skip
"""Suffix -> how such a file is opened."""


def is_compressed(file: Path) -> bool:
    """Whether the suffix of ``file`` is one of ``COMPRESSED``."""
    return file.suffix.lower() in COMPRESSED


def data_kind(path: str | Path) -> str:
    """The suffix that says what is in a file, in lower case: ``.jsonl`` of ``rows.jsonl.gz``."""
    file = Path(path)
    return (Path(file.stem) if is_compressed(file) else file).suffix.lower()


def is_pattern(path: str) -> bool:
    """Whether ``path`` names files by ``*`` or ``?``."""
    return not Path(path).exists() and re.search(r"[*?]", path) is not None


def data_files(path: str) -> list[Path]:
    """The files that ``path`` names: itself, or in the order of names those that match it as a pattern.

    Raises ``UserError`` for a pattern that matches no file.
    """
    if not is_pattern(path):
        return [Path(path)]
    found = [Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]
    if not found:
        raise UserError(f"no file matches {path}; check data.path (relative to the current folder)")
    return found


_SPLIT_NAME = re.compile(r"(?<![a-z])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?![a-z])")


def documents(path: str) -> str:
    """A folder whose data are `.txt` files as the pattern of these, so that each is one document; else ``path``.

    Folders with a file that is named after a split (`train.txt`) are left to ``datasets``, which reads line by line.
    """
    folder = Path(path)
    files = [file for file in folder.iterdir() if data_kind(file) in FILE_KINDS] if folder.is_dir() else []
    texts = {data_kind(file) for file in files} == {".txt"} and not any(map(is_compressed, files))
    if not texts or any(_SPLIT_NAME.search(file.stem.lower()) for file in files):
        return path
    return f"{glob.escape(path)}/*.[tT][xX][tT]"


def is_file_path(path: str) -> bool:
    """Whether ``path`` is meant as local files: it exists, is a pattern, or has a supported suffix."""
    return Path(path).is_file() or is_pattern(path) or data_kind(path) in FILE_KINDS


def is_text_path(path: str) -> bool:
    """Whether ``path`` is one plain-text document."""
    return data_kind(path) == ".txt" and not is_pattern(path)


def split_sample(path: str) -> tuple[str, int | None]:
    """``file.json[5000]`` as ``("file.json", 5000)``; a path without such a suffix, or that exists as it is, unchanged.

    Raises ``UserError`` for a number below 1, and for a ``.txt`` file, which is one document.
    """
    found = re.fullmatch(r"(.+)\[(\d+)\]", path)
    if found is None or Path(path).exists():
        return path, None
    file, rows = found.group(1), int(found.group(2))
    if rows < 1:
        raise UserError(f"{path}: [{rows}] takes no row; give a number of at least 1")
    if is_text_path(file):
        raise UserError(f"{path}: a .txt file is one document, so [{rows}] cannot choose rows of it; give {file} alone")
    return file, rows


def check_file(file: Path, setting: str = "data.path") -> None:
    """Raise ``UserError`` for a data file that is missing or empty; ``setting`` names it."""
    if not file.is_file():
        raise UserError(f"there is no data file {file}; check {setting} (relative to the current folder)")
    if file.stat().st_size == 0:
        raise UserError(f"the data file {file} is empty")


def _decompression_errors() -> tuple[type[Exception], ...]:
    arrow = sys.modules.get("pyarrow")  # imported where a .zst file is opened
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *(() if arrow is None else (arrow.ArrowException,)))


@contextmanager
def open_data(file: Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed as it is read; ``UserError`` for a broken compressed file."""
    if not is_compressed(file):
        with open(file, "rb") as plain:
            yield plain
        return
    try:
        with COMPRESSED[file.suffix.lower()](file) as stream:
            yield stream
    except _decompression_errors() as error:
        raise UserError(
            f"{file} is not a readable {file.suffix.lower()} file ({' '.join(str(error).split())}); get it again"
        ) from error


def csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a table with a header, as a source gives them; cells that a line lacks are None."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_data(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, delimiter="\t" if data_kind(file) == ".tsv" else ",")
        try:
            for row in rows:
                more = UserError(f"the line has more cells than the {len(rows.fieldnames or ())} columns of the header")
                yield f"line {rows.line_num}", more if None in row else row
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 ({error.reason}) after line {rows.line_num}; convert it") from error
        except csv.Error as error:
            raise UserError(f"{file}, line {rows.line_num}: not a readable table ({error})") from error
