"""Hidden states between two blocks, row by row: in memory, or in resumable memory-mapped files with checksums.

    states = HiddenFiles(folder, shape, identity)        rows are written once, in any order
    states.write([4, 5], hidden_bTd); states.read([0, 1]) -> [b, T, d]
    states.missing()                                     rows not written yet, or lost
    states.finish()                                      waits until everything written is on disk

A folder of hidden states holds shards ``states-00000.safetensors`` (tensor ``hidden`` [rows, T, d]) and
``manifest-00.json``: shape, dtype, identity (model, data, layer), and the CRC-32 of every shard. A shard is written
under a temporary name and renamed once all its rows are on disk. With several processes, each writes its own shards and
its own manifest.

Shapes: b requested rows, T tokens, d entries of a hidden state.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trenchcoat.config import UserError
from trenchcoat.runtime.files import PARTIAL_PREFIX, CorruptFileError, saving, sync
from trenchcoat.runtime.sealed import read_sealed, write_sealed

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_PIECE = 1 << 24
"""Bytes per chunk when computing a checksum."""


@dataclass(frozen=True)
class HiddenShape:
    """Sizes of the hidden states of one boundary."""

    rows: int
    tokens: int
    hidden: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.tokens * self.hidden * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


class HiddenStates:
    """Base class of both stores: keeps track of which rows are present."""

    def __init__(self, shape: HiddenShape) -> None:
        self.shape = shape
        self.present: NDArray[np.bool_] = np.zeros(shape.rows, dtype=np.bool_)

    def write(self, rows: Sequence[int], hidden_bTd: Tensor) -> None:
        """Store the hidden states of ``rows`` (from any device); rows already present are skipped."""
        new = [place for place, row in enumerate(rows) if not self.present[row]]
        if not new:
            return
        chosen = hidden_bTd if len(new) == len(rows) else hidden_bTd[new]
        self._write([rows[place] for place in new], chosen.detach().to("cpu", self.shape.dtype))

    def read(self, rows: Sequence[int]) -> Tensor:
        """Hidden states of ``rows``, [b, T, d] in new memory; ``KeyError`` for a missing row."""
        absent = [row for row in rows if not self.present[row]]
        if absent:
            raise KeyError(f"row {absent[0]} of the hidden states is missing")
        return self._read(rows)

    def missing(self) -> list[int]:
        """Missing rows, in order."""
        return [int(row) for row in np.flatnonzero(~self.present)]

    def finish(self) -> None:
        """Wait until all writes are complete."""

    def refresh(self) -> None:
        """Pick up what other processes have written."""

    def remove(self) -> None:
        """Delete all states, in memory and on disk."""
        self.present[:] = False

    def close(self) -> None:
        """Release memory and file handles; files on disk stay."""

    def _write(self, rows: Sequence[int], hidden_bTd: Tensor) -> None:
        raise NotImplementedError

    def _read(self, rows: Sequence[int]) -> Tensor:
        raise NotImplementedError


class HiddenMemory(HiddenStates):
    """Hidden states in host memory."""

    def __init__(self, shape: HiddenShape) -> None:
        super().__init__(shape)
        self._states = torch.empty(shape.rows, shape.tokens, shape.hidden, dtype=shape.dtype)

    def _write(self, rows: Sequence[int], hidden_bTd: Tensor) -> None:
        self._states[torch.tensor(rows)] = hidden_bTd
        self.present[list(rows)] = True

    def _read(self, rows: Sequence[int]) -> Tensor:
        first = rows[0]
        if list(rows) == list(range(first, first + len(rows))):  # in order: no copy
            return self._states[first : first + len(rows)]
        return _gathered([self._states[row] for row in rows])


class HiddenFiles(HiddenStates):
    """Hidden states on disk; an unfinished folder is continued.

    ``identity`` identifies the states (model, data, layer); a folder with another identity is refused with a
    ``UserError`` naming the difference. ``verify`` reads every shard once and compares it with its checksum; a damaged
    or missing shard is reported to ``warn`` and its rows count as missing. Writing raises ``SaveError``.
    """

    def __init__(
        self,
        folder: Path,
        shape: HiddenShape,
        identity: Mapping[str, Any],
        *,
        shard_bytes: int = 256 << 20,
        writer: int = 0,
        writers: int = 1,
        verify: bool = True,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(shape)
        self.folder, self.identity = Path(folder), dict(identity)
        self.writer, self.writers, self.warn = writer, writers, warn
        self.shard_rows = max(1, min(shape.rows, shard_bytes // shape.row_bytes))
        self._open: dict[int, _Writing] = {}
        self._maps: dict[int, Tensor] = {}
        self._finishing: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "trenchcoat-states")
        self._own: dict[int, dict[str, Any]] = {}
        """Entries of this writer's manifest, by shard."""
        self._look(verify)

    @property
    def _manifest(self) -> Path:
        """This writer's manifest."""
        return self.folder / f"manifest-{self.writer:02d}.json"

    def _look(self, verify: bool) -> None:
        for path in sorted(self.folder.glob("manifest-*.json")) if self.folder.is_dir() else []:
            self._read_manifest(path, verify)

    def refresh(self) -> None:
        """Pick up shards that other processes have finished since."""
        self._look(verify=False)

    def missing(self) -> list[int]:
        """Missing rows, in order; with several writers, only those that this one writes."""
        return [row for row in super().missing() if self._mine(row // self.shard_rows)]

    def _mine(self, shard: int) -> bool:
        return shard % self.writers == self.writer

    def _read_manifest(self, path: Path, verify: bool) -> None:
        try:
            manifest = read_sealed(path, "delete it")
        except CorruptFileError as error:
            self.warn(f"{error}; the states it lists are computed again")
            return
        _require_same(path, manifest["header"], self._header())
        for name, shard in manifest["shards"].items():
            index = int(name)
            problem = self._problem(index, shard, verify)
            if problem is not None:
                self.warn(f"{problem}; its rows are computed again")
                continue
            if path == self._manifest:
                self._own[index] = shard
            self.present[self._rows_of(index)] = True

    def _header(self) -> dict[str, Any]:
        shape = self.shape
        sizes = {"rows": shape.rows, "tokens": shape.tokens, "hidden": shape.hidden}
        return {**self.identity, "dtype": SAFETENSORS_DTYPES[shape.dtype], **sizes, "shard_rows": self.shard_rows}

    def _rows_of(self, shard: int) -> slice:
        return slice(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.shape.rows))

    def _path(self, shard: int) -> Path:
        return self.folder / f"states-{shard:05d}.safetensors"

    def _problem(self, index: int, shard: Mapping[str, Any], verify: bool) -> str | None:
        """What is wrong with a finished shard; None if it is intact."""
        path = self._path(index)
        if not path.is_file():
            return f"{path} is missing"
        size, rows = path.stat().st_size, self._rows_of(index)
        expected = len(self._prefix(rows.stop - rows.start)) + (rows.stop - rows.start) * self.shape.row_bytes
        if size != expected:
            return f"{path} has {size} bytes, not {expected}"
        if verify:
            with saving(path):
                found = _crc(path)
            if found != shard["crc32"]:
                return f"{path} is damaged: its checksum is {found}, not {shard['crc32']}"
        return None

    def _prefix(self, rows: int) -> bytes:
        """The header of a safetensors file with one tensor."""
        shape = self.shape
        entry = {
            "dtype": SAFETENSORS_DTYPES[shape.dtype],
            "shape": [rows, shape.tokens, shape.hidden],
            "data_offsets": [0, rows * shape.row_bytes],
        }
        head = json.dumps({"hidden": entry}).encode()
        head += b" " * (-len(head) % 8)
        return struct.pack("<Q", len(head)) + head

    # Writing

    def _write(self, rows: Sequence[int], hidden_bTd: Tensor) -> None:
        self._raise_failures()
        for row, states in zip(rows, hidden_bTd, strict=True):
            index = row // self.shard_rows
            if not self._mine(index):
                continue
            with saving(self._path(index)):
                if index not in self._open:
                    self._open[index] = self._begin(index)
                shard = self._open[index]
                shard.put(row - index * self.shard_rows, states)
            self.present[row] = True
            if shard.left == 0:
                self._finishing.append(self._thread.submit(self._complete, index, self._open.pop(index)))

    def _begin(self, index: int) -> _Writing:
        rows = self._rows_of(index)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{PARTIAL_PREFIX}{self._path(index).name}"
        count = rows.stop - rows.start
        return _Writing(path, self._prefix(count), count, self.shape.row_bytes)

    def _complete(self, index: int, shard: _Writing) -> None:
        """Rename a complete shard to its final name and add it to the manifest."""
        path = self._path(index)
        with saving(path):
            shard.close()
            checksum = _crc(shard.path)
            os.replace(shard.path, path)
            sync(self.folder)
        self._own[index] = {"crc32": checksum}
        shards = {str(i): shard for i, shard in sorted(self._own.items())}
        write_sealed(self._manifest, {"header": self._header(), "shards": shards})

    def _raise_failures(self) -> None:
        waiting = [job for job in self._finishing if not job.done()]
        for job in self._finishing:
            if job.done():
                job.result()
        self._finishing = waiting

    def finish(self) -> None:
        """Wait until every complete shard is on disk; raises ``SaveError``."""
        for job in self._finishing:
            job.result()
        self._finishing = []

    # Reading

    def _read(self, rows: Sequence[int]) -> Tensor:
        shards = [row // self.shard_rows for row in rows]
        return _gathered([self._map(i)[row - i * self.shard_rows] for i, row in zip(shards, rows, strict=True)])

    def _map(self, index: int) -> Tensor:
        if index not in self._maps:
            self.finish()
            rows, path = self._rows_of(index), self._path(index)
            count = rows.stop - rows.start
            try:
                sizes = (count, self.shape.tokens, self.shape.hidden)
                self._maps[index] = _mapped(path, len(self._prefix(count)), sizes, self.shape.dtype)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path} cannot be read ({error}); run the same command again to recompute what is lost"
                ) from error
        return self._maps[index]

    def remove(self) -> None:
        """Delete all files of the folder; only for folders that no other process writes to."""
        self.close()
        super().remove()
        self._own = {}
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if path.name.startswith((PARTIAL_PREFIX, "states-", "manifest-")):
                    path.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def close(self) -> None:
        """Close the memory maps; incomplete shards are deleted and their rows become missing again."""
        self._thread.shutdown()
        for index, shard in self._open.items():
            shard.discard()
            self.present[self._rows_of(index)] = False
        self._open, self._maps = {}, {}
        self._thread = ThreadPoolExecutor(1, "trenchcoat-states")


class _Writing:
    """A shard being written; ``left`` rows are still missing."""

    def __init__(self, path: Path, prefix: bytes, rows: int, row_bytes: int) -> None:
        self.path, self.left = path, rows
        self._offset, self._row_bytes = len(prefix), row_bytes
        self._file = open(path, "w+b")  # noqa: SIM115 (closed by close)
        try:
            self._file.write(prefix)
            self._file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), len(prefix), rows * row_bytes)
        except OSError:
            self.discard()
            raise

    def put(self, place: int, states_Td: Tensor) -> None:
        """Write one row."""
        data = states_Td.contiguous().view(torch.uint8).numpy().data.cast("B")
        at = self._offset + place * self._row_bytes
        while data:
            written = os.pwrite(self._file.fileno(), data, at)
            data, at = data[written:], at + written
        self.left -= 1

    def close(self) -> None:
        """Flush everything to disk and close the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Delete the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def _gathered(states_Td: Sequence[Tensor]) -> Tensor:
    """[b, T, d] in new memory, copied by numpy.

    Torch would start another OpenMP thread team for the prefetch thread; with more threads than cores, libgomp puts all
    of them to sleep between operations.
    """
    out = torch.empty(len(states_Td), *states_Td[0].shape, dtype=states_Td[0].dtype)
    for place, states in zip(out, states_Td, strict=True):
        np.copyto(place.view(torch.uint8).numpy(), states.view(torch.uint8).numpy())
    return out


def _mapped(path: Path, offset: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """The states of a shard [rows, T, d], mapped copy-on-write (nothing writes to them)."""
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", offset=offset)).view(dtype).view(sizes)


def _crc(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found


def _require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"{path} lists hidden states of another run: {name} was {before.get(name)!r} and is {now.get(name)!r} now. "
            "Delete that folder, or undo the change"
        )
