"""An adapter folder on disk: what was learned, without the base model, and what it was learned with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trenchcoat.config import UserError
from trenchcoat.runtime.files import CorruptFileError, load_tensors, read_json, save_tensors, sha256, write_json

ADAPTER_FILE = "adapter.safetensors"
ADAPTER_META = "trenchcoat.json"


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``adapter.safetensors`` and ``trenchcoat.json`` (``meta`` plus the checksum of the tensors)."""
    directory = Path(directory)
    save_tensors(directory / ADAPTER_FILE, tensors, {"format": "pt"})
    write_json(directory / ADAPTER_META, {**meta, "sha256": sha256(directory / ADAPTER_FILE)})


def read_adapter(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter folder: ``(tensors, meta)``.

    Raises ``UserError`` when the folder is no adapter and ``CorruptFileError`` when the tensors are damaged or do not
    belong to the JSON beside them.
    """
    directory = Path(directory)
    for name in (ADAPTER_META, ADAPTER_FILE):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is not an adapter folder: {name} is missing")
    meta = read_json(directory / ADAPTER_META)
    if not isinstance(meta, dict):
        raise CorruptFileError(f"{directory / ADAPTER_META} should hold a JSON object")
    expected = meta.get("sha256")
    if expected is not None and sha256(directory / ADAPTER_FILE) != expected:
        raise CorruptFileError(
            f"{directory / ADAPTER_FILE} does not match the checksum in {ADAPTER_META}: it is damaged or from another "
            "export; export the adapter again"
        )
    return load_tensors(directory / ADAPTER_FILE), meta
