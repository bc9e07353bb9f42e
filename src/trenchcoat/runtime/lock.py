"""One command at a time in a folder: a lock that the operating system gives back when its holder dies."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trenchcoat.config import UserError
from trenchcoat.runtime.files import saving

LOCK_FILE = ".lock"


class InUse(UserError):
    """A folder that another command holds."""


@contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Hold ``directory`` (made if need be) while the block runs; ``InUse`` naming the holder when it is taken."""
    path = Path(directory) / LOCK_FILE
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 4096).decode("utf-8", errors="replace").strip() or "another process"
            raise InUse(
                f"{directory} is in use by {holder}. Wait for it, stop it, or give this run a folder of its own "
                "(run.dir=...)"
            ) from error
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300]
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {since}: {command}".encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(directory: Path | str) -> str | None:
    """Who holds ``directory``, in words; None when nobody does. Nothing is taken, and nothing is made."""
    path = Path(directory) / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        told = os.read(descriptor, 4096).decode("utf-8", errors="replace").strip()
        if not told:  # given back in good order; asking the system would itself take it for a moment
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return told
        return None
    finally:
        os.close(descriptor)
