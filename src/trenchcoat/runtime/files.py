"""Atomic file writes: to a temporary path in the same folder, flushed to disk, then renamed.

Every file the system leaves behind (checkpoints, adapters, the run's record) goes through here, so a killed process or
a full disk never leaves a partial file under its final name. :func:`locked` allows one command at a time in a folder,
with a lock that the operating system releases when its holder dies.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trenchcoat.config import UserError

PARTIAL_PREFIX = ".partial-"
"""Name prefix of files and folders that are still being written."""

CONTENT = "content_sha256"
"""Name of the checksum in the metadata of a file of tensors."""

_HOST, _START = hashlib.sha256(platform.node().encode()).hexdigest()[:8], uuid.uuid4().hex[:8]
_OWN = f"{_HOST}-{_START}"
"""This machine and this process, in names of partial files."""
_PARTIAL_NAME = re.compile(
    rf"{re.escape(PARTIAL_PREFIX)}(?P<host>[0-9a-f]{{8}})-(?P<start>[0-9a-f]{{8}})-(?P<pid>\d+)-[0-9a-f]{{8}}-(?P<name>.+)"
)

_UMASK = os.umask(0)
"""Permissions that new files of this process do not get."""
os.umask(_UMASK)

LOCK_FILE, HOLDER_FILE = ".lock", ".lock-holder"
_PROBE_SECONDS = 0.05
"""Timeout when only probing a lock, as another process may be probing it too."""


class SaveError(UserError):
    """Writing failed (disk full, no permission); existing files are unchanged."""


class CorruptFileError(UserError):
    """A file is damaged or does not match its checksum."""


class InUse(UserError):
    """Another command is using the folder."""


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries (so that a rename inside it survives a power cut), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_new_file(path: Path) -> None:
    """Give a file the permissions of any new one, where the file system has them: safetensors makes its files
    unreadable for everybody else."""
    with suppress(OSError):
        path.chmod(0o666 & ~_UMASK)


def is_disk_full(error: BaseException) -> bool:
    """Whether an OS or safetensors error means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "no space left" in str(error).lower() or "quota exceeded" in str(error).lower()


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turn a failed write inside the block into a ``SaveError`` naming ``target`` and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise SaveError(
                f"the disk is full while saving {target}; what was saved before is intact. Free some space (or choose "
                "another run.dir) and run the same command again"
            ) from error
        raise SaveError(f"cannot save {target}: {error}; what was saved before is intact") from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``target``; it is renamed to ``target`` when the block succeeds.

    Raises ``SaveError`` when the disk is full or the folder cannot be written; the old file is then unchanged.
    """
    target = Path(target)
    partial = partial_path(target)
    with saving(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(target.parent, target.name)
            yield partial
            as_new_file(partial)
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
        finally:
            remove(partial)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Like ``atomic_file`` for a folder; its files are flushed first. An existing ``target`` is replaced."""
    target = Path(target)
    partial = partial_path(target)
    with saving(target):
        try:
            partial.mkdir(parents=True)
            remove_abandoned(target.parent, target.name)
            yield partial
            publish_directory(partial, target)
        finally:
            remove(partial)


def publish_directory(partial: Path, target: Path) -> None:
    """Flush the files of a finished folder and rename it to ``target``; an existing ``target`` is replaced."""
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            as_new_file(path)
            sync(path)
    sync(partial)
    if target.exists():
        remove(target)
    os.replace(partial, target)
    sync(target.parent)


def partial_path(target: Path) -> Path:
    """A path beside ``target`` for this process to write to; its name tells whose it is."""
    return target.parent / f"{PARTIAL_PREFIX}{_OWN}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{target.name}"


def remove_abandoned(directory: Path, name: str | None = None) -> None:
    """Delete what processes of this machine that were killed had begun to write in ``directory``: all of it, in the
    folders below too, or the unfinished files of one ``name``."""
    pattern = f"{PARTIAL_PREFIX}*"
    for path in directory.rglob(pattern) if name is None else directory.glob(pattern):
        found = _PARTIAL_NAME.fullmatch(path.name)
        if found is not None and name in (None, found["name"]) and found["host"] == _HOST:
            pid = int(found["pid"])
            if found["start"] != _START if pid == os.getpid() else not _alive(pid):
                remove(path)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def remove_partials(directory: Path) -> list[str]:
    """Delete what an interrupted save left in ``directory``; returns the names."""
    if not directory.is_dir():
        return []
    names = [path.name for path in sorted(directory.iterdir()) if path.name.startswith(PARTIAL_PREFIX)]
    for name in names:
        remove(directory / name)
    return names


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically (indented, keys in the order given)."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises ``CorruptFileError`` naming the file when it is not JSON, ``FileNotFoundError`` when absent."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON ({error}); restore it, or make it again") from error
    except IsADirectoryError as error:
        raise CorruptFileError(f"{path} is a folder, not a JSON file; restore it, or make it again") from error


def separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors that safetensors can store: detached, contiguous, none sharing storage (views are copied)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        address = own.untyped_storage().data_ptr()
        if own.numel() and address in seen:
            own = own.clone()
        seen.add(address)
        plain[name] = own
    return plain


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors with a checksum, atomically. Any dtype and device; tensors that share storage
    are copied."""
    plain, record = separate_storage(tensors), dict(metadata or {})
    with atomic_file(Path(path)) as partial:
        save_file(plain, partial, metadata={**record, CONTENT: content_digest(plain, record)})


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; raises ``CorruptFileError`` naming a damaged one, ``FileNotFoundError`` when absent."""
    return read_tensors(path, device)[0]


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, checked against its checksum if it has one.

    The checksum is ``metadata[CONTENT]``. Raises as :func:`load_tensors`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is not a readable safetensors file ({error})") from error
    if CONTENT in metadata and metadata[CONTENT] != content_digest(tensors, metadata):
        raise CorruptFileError(f"{path} is damaged: its content does not match its checksum")
    return tensors, metadata


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of named tensors (bits, shapes, dtypes) and of what else a file records about them."""
    record = {name: value for name, value in metadata.items() if name != CONTENT}
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Lock ``directory`` (created if needed) while the block runs; raises ``InUse`` naming the holder of the lock."""
    path, name = Path(directory) / LOCK_FILE, Path(directory) / HOLDER_FILE
    lock = FileLock(path)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InUse(
                f"{directory} is in use by {_read_holder(name) or 'another process'}. Wait for it, stop it, or give "
                "this run another folder (run.dir=...)"
            ) from error
    try:
        remove_abandoned(Path(directory))
        program = Path(sys.argv[0])
        called = program.parent.name if program.name == "__main__.py" else program.name
        command = " ".join([called, *sys.argv[1:]])[:300]
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with saving(name):
            name.write_text(f"process {os.getpid()} on {platform.node()} since {since}: {command}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            name.unlink()
        lock.release()


def holder(directory: Path | str) -> str | None:
    """The command that has locked ``directory``, for messages, or None. Leaves no lock and creates nothing."""
    name = Path(directory) / HOLDER_FILE
    if not _read_holder(name):
        return None
    try:  # a killed holder leaves its name but not its lock
        with FileLock(Path(directory) / LOCK_FILE, timeout=_PROBE_SECONDS):
            name.unlink(missing_ok=True)
        return None
    except OSError:  # locked, or no permission to open it
        return _read_holder(name) or None


def _read_holder(name: Path) -> str:
    try:
        return name.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""
