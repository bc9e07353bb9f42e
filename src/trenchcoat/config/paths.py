"""Paths as users write them: `~` is the home folder, in every setting and option, also where no shell expands it."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from pathlib import Path

from trenchcoat.config.errors import UserError


def expanded(path: str) -> str:
    """``path`` with a leading `~` or `~name` replaced by the home folder; ``UserError`` where there is no such user."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{path}: there is no home folder {Path(path).parts[0]}; write the path from / on")
    return found


def absolute_if_here(source: str) -> str:
    """``source`` as an absolute path if it is a file or folder here, or a pattern of some (with or without a sample,
    `rows.jsonl[500]`), else as it is: a hub id, or `embedded`."""
    file = re.sub(r"\[\d+\]$", "", source)
    here = source != "embedded" and any(os.path.exists(path) or glob.glob(path) for path in (source, file))
    return os.path.abspath(source) if here else source


def same_place(one: object, other: object) -> bool:
    """Whether two records can mean one place: equal, or an absolute path and a relative one that it ends with."""
    if not isinstance(one, str) or not isinstance(other, str) or os.path.isabs(one) == os.path.isabs(other):
        return one == other
    long, short = (one, other) if os.path.isabs(one) else (other, one)
    parts = [part for part in Path(os.path.normpath(short)).parts if part not in ("..", ".")]
    return bool(parts) and list(Path(os.path.normpath(long)).parts[-len(parts) :]) == parts


def require_writable(target: Path | str, name: str) -> None:
    """Raise ``UserError`` when no file can be written at ``target``; nothing is left there.

    ``name`` is the setting or option that names it. Call it before the work whose result goes there.
    """
    target = Path(target)
    if target.is_dir():
        raise UserError(f"{name}: {target} is a folder; give the path of a file")
    _require_writable(target, target.parent, name)


def require_writable_folder(target: Path | str, name: str) -> None:
    """As :func:`require_writable`, for the folder ``target``, which is there or would be made."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{name}: {target} is a file; give the path of a folder")
    _require_writable(target, target, name)


def _require_writable(target: Path, folder: Path, name: str) -> None:
    """Raise ``UserError`` when nothing can be written in ``folder``, or where it would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{name}: {folder} is a file, so {target} cannot be written; choose another path")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{name}: {target} cannot be written, since nothing can be written in {folder} ({error.strerror})"
        ) from error
