"""Resumable training checkpoints.

A checkpoint is a folder ``step-00000100`` holding safetensors groups, ``state.json`` and ``manifest.json`` with the
SHA-256 of each file. It appears by a rename, so it is complete or absent; a file damaged later is found by its
checksum, and the newest sound checkpoint before it is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from trenchcoat.runtime import distributed
from trenchcoat.runtime.files import (
    PARTIAL_PREFIX,
    CorruptFileError,
    is_disk_full,
    publish_directory,
    read_json,
    remove_partials,
    saving,
    separate_storage,
    sha256,
)

MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder: its step, its JSON state, and its tensor groups read on demand."""

    path: Path
    step: int
    state: dict[str, Any]

    def names(self) -> list[str]:
        """Names of all tensors in it."""
        found: set[str] = set()
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as opened:
                found |= set(opened.keys())
        return sorted(found)

    def load_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors``, whole or sharded, whatever the number of processes that wrote them; a collective."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(self.path))
            dcp.load(dict(tensors), storage_reader=reader, no_dist=distributed.size() == 1)


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of the checkpoint of ``step`` under ``root``."""
    return Path(root) / f"step-{step:08d}"


class CheckpointWriter:
    """One checkpoint on its way to disk: nothing but ``finish`` makes it count.

    One process writes ``tensors`` (by group, whose names must not clash) at once; several write their shards together,
    through torch's distributed checkpoints, in the background when there is a ``side_group`` for it. Raises
    ``SaveError`` when the disk is full, leaving the older checkpoints as they were.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        side_group: Any = None,
    ) -> None:
        self.target, self.step, self.state = checkpoint_path(root, step), step, dict(state)
        self.partial = Path(root) / f"{PARTIAL_PREFIX}{self.target.name}"
        self._future: Any = None
        distributed.from_main(self._prepare)
        with saving(self.target), self._whole_or_nothing():
            if distributed.size() == 1:
                for group, tensors in groups.items():
                    save_file(separate_storage(tensors), self.partial / f"{group}.safetensors")
                return
            together = {name: tensor for tensors in groups.values() for name, tensor in tensors.items()}
            writer = HuggingFaceStorageWriter(str(self.partial), save_distributed=True)
            if side_group is None:
                dcp.save(together, storage_writer=writer)
            else:
                self._future = dcp.async_save(together, storage_writer=writer, process_group=side_group)

    def finish(self) -> Path:
        """Wait until all is written, add state and checksums, and put the checkpoint in its place."""
        with saving(self.target), self._whole_or_nothing():
            if self._future is not None:
                self._future.result()
        distributed.from_main(self._publish)
        return self.target

    def _prepare(self) -> None:
        with saving(self.target):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def _publish(self) -> None:
        with saving(self.target), self._whole_or_nothing():
            (self.partial / STATE).write_text(json.dumps(self.state, indent=2) + "\n", encoding="utf-8")
            files = {path.name: sha256(path) for path in sorted(self.partial.iterdir())}
            manifest = json.dumps({"step": self.step, "sha256": files}, indent=2) + "\n"
            (self.partial / MANIFEST).write_text(manifest, encoding="utf-8")
            publish_directory(self.partial, self.target)

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """Take the unfinished folder away when the block fails."""
        try:
            yield
        except dcp.CheckpointException as error:
            self._take_away()
            raise OSError(*_system_error(error)) from error
        except (OSError, SafetensorError):
            self._take_away()
            raise

    def _take_away(self) -> None:
        if distributed.is_main():
            shutil.rmtree(self.partial, ignore_errors=True)


def _system_error(error: dcp.CheckpointException) -> tuple[int, str]:
    """(errno, words) of the first process's failure."""
    for rank, (failure, _) in error.failures.items():
        full = is_disk_full(failure)
        code = errno.ENOSPC if full else getattr(failure, "errno", None) or errno.EIO
        return code, f"process {rank}: {failure}"
    return errno.EIO, str(error)


def write_checkpoint(
    root: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write one complete checkpoint now; see :class:`CheckpointWriter`."""
    return CheckpointWriter(root, step, groups, state).finish()


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify one checkpoint folder by its manifest; raises ``CorruptFileError`` naming the first bad file."""
    match = _STEP_NAME.fullmatch(path.name)
    if match is None or not (path / MANIFEST).is_file():
        raise CorruptFileError(f"{path} is not a complete checkpoint: {MANIFEST} is missing")
    manifest = read_json(path / MANIFEST)
    files = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or STATE not in files:
        raise CorruptFileError(f"{path / MANIFEST} lists no files")
    for name, expected in files.items():
        if not (path / name).is_file():
            raise CorruptFileError(f"{path / name} is missing")
        if sha256(path / name) != expected:
            raise CorruptFileError(f"{path / name} is damaged: its checksum is not the one in {MANIFEST}")
    return Checkpoint(path=path, step=int(match.group(1)), state=read_json(path / STATE))


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoint folders under ``root``, oldest first, verified or not."""
    if not Path(root).is_dir():
        return []
    found = [path for path in Path(root).iterdir() if path.is_dir() and _STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint under ``root``, or None; ``warn`` is told about every damaged one passed over."""
    for path in reversed(checkpoint_folders(root)):
        try:
            return read_checkpoint(path)
        except CorruptFileError as error:
            warn(f"{error}; this checkpoint is not used")
    return None


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what an interrupted save left behind."""
    for path in checkpoint_folders(root)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    remove_partials(Path(root))
