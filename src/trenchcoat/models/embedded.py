"""The embedded default: a small pretrained Llama and text that every Python installation already has.

The text is the Python standard library's own source, read from the running interpreter, so nothing is downloaded and no
third-party text is in the repository. The teacher in this folder was pretrained on it by
``scripts/pretrain_embedded_teacher.py``; ``embedded_teacher/README.md`` holds its log and held-out loss.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

TEACHER_DIR = Path(__file__).parent / "embedded_teacher"

Split = Literal["train", "validation"]
HELD_OUT_ONE_IN = 20
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip", "idlelib"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


def teacher_dir() -> Path:
    """Folder of the embedded teacher in Hugging Face format; raises ``FileNotFoundError`` when it is not installed."""
    if not (TEACHER_DIR / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded teacher is missing: expected {TEACHER_DIR / 'model.safetensors'}. "
            "Reinstall trenchcoat, or make it again with scripts/pretrain_embedded_teacher.py."
        )
    return TEACHER_DIR


def split_of(relative_path: str) -> Split:
    """Split of one source file: a hash of its path decides, so the same file is held out on every machine."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return "validation" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0 else "train"


def stdlib_documents(split: Split, *, tests: bool = False, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield ``(relative path, source text)`` of the standard library's modules, in path order.

    ``tests`` adds the library's own test suite (not every distribution ships it). Files that are not UTF-8, and the
    nearly empty ones (under 200 characters), are skipped. Raises ``FileNotFoundError`` when the interpreter has no
    source at all (some minimal images strip it).
    """
    base = root if root is not None else Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).parts
        if _SKIPPED_FOLDERS.intersection(parts) or (not tests and _TEST_FOLDERS.intersection(parts)):
            continue
        name = "/".join(parts)
        if split_of(name) != split:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) < 200:
            continue
        found = True
        yield name, text
    if not found:
        raise FileNotFoundError(
            f"no Python source found under {base} for the {split!r} split. This interpreter was installed without "
            "the standard library's source; use another interpreter, or point data.path at a text file of yours."
        )
