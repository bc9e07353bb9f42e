"""The licence of a base model: what its card says of it, and its files, which travel with every model made of it."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from trenchcoat.models.embedded import teacher_dir

CARD = "README.md"
_FILE = re.compile(r"(licen[cs]e|notice|use_policy|copying)([._-].*)?", re.IGNORECASE)
_PATTERNS = [f"{word}*" for word in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING", "License", "Notice")]
"""The names on the hub that are fetched."""
_LARGEST = 1 << 20
"""Bytes above which a file is no licence."""
_UNREACHABLE = (OSError, ValueError, HfHubHTTPError, HFValidationError)


def base_source(model: Any) -> tuple[str, str | None]:
    """(path or hub id, revision) of the base of ``model``, or of the complete folder it was opened from; "" if it was
    made in memory."""
    source = getattr(model, "trenchcoat_adapter", {}).get("base", {})
    return str(source.get("path") or getattr(model.config, "name_or_path", "") or ""), source.get("revision")


def licence_files(folder: Path) -> list[Path]:
    """Licences, notices and use policies in a folder of a model."""
    found = [path for path in folder.glob("*") if _FILE.fullmatch(path.name) and path.is_file()]
    return sorted(path for path in found if path.stat().st_size <= _LARGEST)


def copy_licences(model: Any, folder: Path, *, online: bool = False) -> None:
    """Copy the licence files of the base of ``model`` into ``folder``, where it has no files of these names.

    Those of a hub id come from the cache; ``online``: they are fetched first.
    """
    path, revision = base_source(model)
    local = teacher_dir() if path == "embedded" else Path(path).expanduser()
    if path and not local.exists() and not local.is_absolute():
        local = _snapshot(path, revision, online) or local
    for file in licence_files(local) if path and local.is_dir() else ():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _snapshot(repo_id: str, revision: str | None, online: bool) -> Path | None:
    """The folder of a hub id in the cache, with its licences if these can be fetched."""
    for only_local in (False, True) if online else (True,):
        try:
            return Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS, local_files_only=only_local)
            )
        except _UNREACHABLE:
            continue
    return None


@functools.cache
def hub_licence(repo_id: str, revision: str | None, online: bool) -> dict[str, str] | None:
    """:func:`card_licence` of a hub id; ``online``: asked of the hub where the card is not in the cache."""
    try:
        return card_licence(Path(hf_hub_download(repo_id, CARD, revision=revision, local_files_only=not online)))
    except _UNREACHABLE:
        return None


def card_licence(card: Path) -> dict[str, str] | None:
    """The licence that a model card names, in its own keys: `license`, and for `other` its name and link."""
    try:
        found = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError):
        return None
    named = {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}
    if not named.get("license_link", "https:").startswith("https:"):
        del named["license_link"]  # a file of that repository
    return named if "license" in named else None
