"""What is read from and written to disk: the pretrained model, adapters, and resumable training checkpoints.

A training checkpoint is a folder ``step-00000100`` holding safetensors groups, ``state.json`` and ``manifest.json``
with the SHA-256 of each file. It appears by a rename, so it is complete or absent; a file damaged later is found by its
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

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from trenchcoat import distributed
from trenchcoat.config import ModelConfig, UserError
from trenchcoat.embedded import teacher_dir
from trenchcoat.files import (
    PARTIAL_PREFIX,
    CorruptFileError,
    SaveError,
    atomic_directory,
    atomic_file,
    is_disk_full,
    load_tensors,
    publish_directory,
    read_json,
    remove_partials,
    save_tensors,
    saving,
    separate_storage,
    sha256,
    write_json,
    write_text,
)
from trenchcoat.identity import fingerprint

__all__ = [
    "ADAPTER_FILE",
    "ADAPTER_META",
    "Checkpoint",
    "CorruptFileError",
    "SaveError",
    "atomic_directory",
    "atomic_file",
    "fingerprint",
    "load_model",
    "load_tensors",
    "load_tokenizer",
    "model_source",
    "newest_checkpoint",
    "prune_checkpoints",
    "read_adapter",
    "read_json",
    "resolve_device",
    "resolve_dtype",
    "save_tensors",
    "write_adapter",
    "write_checkpoint",
    "write_json",
    "write_text",
]

ADAPTER_FILE = "adapter.safetensors"
ADAPTER_META = "trenchcoat.json"
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")


# The pretrained model


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU when there is one; an impossible device is a ``UserError``."""
    if distributed.size() > 1:
        return distributed.device()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device={name!r} is not a device; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"model.device={name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA device(s)")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UserError(f"model.dtype={name!r} is not known; expected auto, {', '.join(known)}")
    return known[name]


def model_source(cfg: ModelConfig) -> str:
    """Folder or hub id of a model; raises ``UserError`` for what can be neither."""
    if cfg.path == "embedded":
        try:
            return str(teacher_dir())
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    local = Path(cfg.path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            hint = f"; it is an adapter: use trenchcoat.load({cfg.path!r})" if (local / ADAPTER_META).is_file() else ""
            raise UserError(f"model.path={cfg.path!r} is not a Hugging Face model folder (no config.json){hint}")
        return str(local)
    if local.exists():
        raise UserError(f"model.path={cfg.path!r} is a file; give the folder that holds config.json")
    if cfg.path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", cfg.path):
        raise UserError(f"model.path={cfg.path!r}: no such folder. Give a local folder, a hub id, or `embedded`")
    return cfg.path


def load_model(cfg: ModelConfig, quantization_config: Any = None) -> tuple[nn.Module, Any]:
    """Load the whole pretrained model (evaluation mode, nothing trainable) and its tokenizer.

    Raises ``UserError`` for an unknown path or id, a folder that is no causal language model, a missing tokenizer,
    an attention implementation that cannot run here, or an impossible device.
    """
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    source = model_source(cfg)
    attention = None if cfg.attention == "auto" else cfg.attention
    options: dict[str, Any] = {"revision": cfg.revision, "dtype": dtype, "attn_implementation": attention}
    if quantization_config is not None:
        options |= {"quantization_config": quantization_config, "device_map": {"": device}}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load model.path={cfg.path!r} (revision {cfg.revision}, attention {cfg.attention!r}): "
            f"{_one_line(error)}. Expected a hub id, a local folder in Hugging Face format, or `embedded`"
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model.path={cfg.path!r} lacks {len(missing)} weights ({missing[0]}, ...), so it would "
            "run with random ones; give a complete causal language model"
        )
    tokenizer = load_tokenizer(cfg, source)
    if quantization_config is None:
        model = model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(cfg: ModelConfig, source: str) -> Any:
    """The tokenizer beside a model; raises ``UserError`` when there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, revision=cfg.revision)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"model.path={cfg.path!r} has no tokenizer that can be loaded: {_one_line(error)}") from error


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


# Adapters: what was learned, without the base model


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


# Resumable training checkpoints


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
