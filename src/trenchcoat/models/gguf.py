"""GGUF files as base models: read once through Transformers and the package `gguf`, and kept as a model folder.

The weights are dequantized to bfloat16, in ``~/.cache/trenchcoat/gguf``, under a hash of the file. Everything else then
works on that folder as on any other base: sharding, blocks, fingerprints.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import struct
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trenchcoat.config import UserError
from trenchcoat.config.errors import refusals
from trenchcoat.models.basefolder import LOAD_ERRORS, reason
from trenchcoat.runtime.files import atomic_directory, sha256

SUFFIX = ".gguf"
_OF_THE_FILE = ("quantization_config", "_name_or_path", "dtype")
"""Settings of a config that describe the file and not the model."""


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` is a GGUF file by its name."""
    return Path(path).suffix.lower() == SUFFIX and Path(path).is_file()


def gguf_config(path: Path) -> Any:
    """The Transformers config of a GGUF file; ``UserError`` when it cannot be read."""
    _require_package(path)
    with _reading(path):
        found = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        settings = found.to_dict()
    for name in _OF_THE_FILE:
        settings.pop(name, None)
    return type(found).from_dict(settings)


def gguf_folder(path: Path) -> Path:
    """The folder in Hugging Face format of a GGUF file, made at the first call.

    Raises ``UserError`` for a file that cannot be read, an architecture that Transformers does not know, and a missing
    package.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)
    folder = Path.home() / ".cache" / "trenchcoat" / "gguf" / f"{name}-{_hash(path)}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):  # other processes wait for the one that makes it
            if not (folder / "config.json").is_file():
                _convert(path, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    config = gguf_config(path)
    with _reading(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)  # a model read from GGUF refuses to be saved
    model.tie_weights()
    with atomic_directory(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _reading(path: Path) -> refusals:
    kinds = (*LOAD_ERRORS, struct.error)
    return refusals(lambda error: f"{path} cannot be read as a GGUF model: {reason(error)}", kinds)


def _require_package(path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path}: reading GGUF files needs the package gguf: pip install gguf")


def _hash(path: Path) -> str:
    """Of the whole file; computed once while the file stays as it is."""
    found = path.stat()
    return _hash_of(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _hash_of(path: Path, size: int, changed: int) -> str:
    return sha256(path)[:12]
