"""JSON files that carry a checksum of their content, so that damage is an error and never a setting or a score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trenchcoat.runtime.files import CorruptFileError, read_json, write_json

CHECKSUM = "checksum"
"""The key of the checksum, beside the content's own keys."""


def digest(content: Any) -> str:
    """SHA-256 of a JSON value, the same before it is written and after it is read; tuples count as lists."""
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with its checksum."""
    own = {name: value for name, value in content.items() if name != CHECKSUM}
    return {**own, CHECKSUM: digest(own)}


def opened(content: Any, path: Path, fix: str) -> dict[str, Any]:
    """What :func:`sealed` was given; ``CorruptFileError`` naming ``path`` and the ``fix`` when it is not that."""
    if not isinstance(content, dict) or CHECKSUM not in content:
        raise CorruptFileError(f"{path} has no checksum: it is damaged, or of an earlier version; {fix}")
    own = {name: value for name, value in content.items() if name != CHECKSUM}
    if content[CHECKSUM] != digest(own):
        raise CorruptFileError(f"{path} does not match its checksum: it is damaged, or was changed by hand; {fix}")
    return own


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` with its checksum, atomically."""
    write_json(path, sealed(content))


def read_sealed(path: Path, fix: str) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote; raises as :func:`opened`, and ``FileNotFoundError`` when absent."""
    try:
        content = read_json(path)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; {fix}") from error
    return opened(content, path, fix)
