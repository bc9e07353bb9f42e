"""Resumable training checkpoints.

A checkpoint is a folder ``step-00000100`` holding safetensors files, ``state.json`` and ``manifest.json`` with the
SHA-256 of each file. It is published by a rename, so it is either complete or absent. Later damage is detected by the
checksums, and the newest intact checkpoint is used instead. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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

from trenchcoat.config import UserError
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
from trenchcoat.students import StudentAttention

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
"""File of a single process; several processes write one file each."""
STATE = "state.json"
STATE_VERSION = 3
"""Version of the checkpoint contents. 3: a missing loss is Infinity in ``state.json``, as Python writes it."""
_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder: its step, its JSON state, and its tensors, read on demand."""

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
        """Fill ``tensors``, full or sharded, no matter how many processes wrote the checkpoint; a collective."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(self.path))
            dcp.load(dict(tensors), storage_reader=reader, no_dist=distributed.size() == 1)


class CheckpointWriter:
    """A checkpoint being written; readers see it only after ``finish``.

    A single process writes ``tensors`` immediately; several write their shards through torch's distributed
    checkpointing, in the background if ``side_group`` is given. Raises ``SaveError`` when the disk is full; older
    checkpoints are not touched.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        side_group: Any = None,
    ) -> None:
        self.target, self.step, self.state = Path(root) / f"step-{step:08d}", step, dict(state)
        self.partial = Path(root) / f"{PARTIAL_PREFIX}{self.target.name}"
        self._future: Any = None
        distributed.from_main(self._prepare)
        with saving(self.target), self._whole_or_nothing():
            if distributed.size() == 1:
                save_file(separate_storage(tensors), self.partial / TENSORS)
                return
            writer = HuggingFaceStorageWriter(str(self.partial), save_distributed=True)
            if side_group is None:
                dcp.save(dict(tensors), storage_writer=writer)
            else:
                self._future = dcp.async_save(dict(tensors), storage_writer=writer, process_group=side_group)

    def finish(self) -> Path:
        """Wait until everything is written, add state and checksums, and rename the checkpoint to its final name."""
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
        """Delete the unfinished folder when the block fails."""
        try:
            yield
        except dcp.CheckpointException as error:
            self._delete()
            raise OSError(*_system_error(error)) from error
        except (OSError, SafetensorError):
            self._delete()
            raise

    def _delete(self) -> None:
        if distributed.is_main():
            shutil.rmtree(self.partial, ignore_errors=True)


def _system_error(error: dcp.CheckpointException) -> tuple[int, str]:
    """(errno, message) of the first process that failed."""
    for rank, (failure, _) in error.failures.items():
        full = is_disk_full(failure)
        code = errno.ENOSPC if full else getattr(failure, "errno", None) or errno.EIO
        return code, f"process {rank}: {failure}"
    return errno.EIO, str(error)


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify one checkpoint folder by its manifest; raises ``CorruptFileError`` naming the first bad file."""
    match = _STEP_NAME.fullmatch(path.name)
    if match is None or not (path / MANIFEST).is_file():
        raise CorruptFileError(f"{path} is not a complete checkpoint: {MANIFEST} is missing")
    manifest = read_json(path / MANIFEST)
    files = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or STATE not in files:
        raise CorruptFileError(f"{path / MANIFEST} lists no files")
    added = [file.name for file in path.glob("*.safetensors") if file.name not in files]
    if added:  # it would be read as a part of the checkpoint
        raise CorruptFileError(f"{path / min(added)} is not a file of this checkpoint: {MANIFEST} does not list it")
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
    """The newest intact checkpoint under ``root``, or None; calls ``warn`` for every damaged one."""
    for path in reversed(checkpoint_folders(root)):
        try:
            return read_checkpoint(path)
        except CorruptFileError as error:
            warn(f"{error}; skipping this checkpoint")
    return None


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and the leftovers of interrupted saves."""
    for path in checkpoint_folders(root)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    remove_partials(Path(root))


class CheckpointManager:
    """The checkpoints of one stage under ``root``; keeps the newest ``keep``.

    With ``background``, multi-process saves run while training continues; ``finish`` waits for them.
    """

    def __init__(self, root: Path, keep: int, warn: Callable[[str], None], *, background: bool) -> None:
        self.root, self.keep, self.warn = root, max(keep, 1), warn
        self._side = distributed.side_group() if background and distributed.size() > 1 else None
        self._writing: CheckpointWriter | None = None

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``, or start writing it in the background; raises ``SaveError``."""
        self.finish()
        self._writing = CheckpointWriter(self.root, step, tensors, state, self._side)
        if self._side is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written, then delete old ones."""
        if self._writing is None:
            return
        writer, self._writing = self._writing, None
        writer.finish()
        if distributed.is_main():
            prune_checkpoints(self.root, self.keep)

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint; warns about damaged ones."""
        found: Checkpoint | None = distributed.from_main(lambda: newest_checkpoint(self.root, self.warn))
        return found


def identity(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    batches: Any,
    settings: Mapping[str, Any],
    base: str | None,
) -> dict[str, Any]:
    """What must match to continue from a checkpoint: settings, data, trained names, base and frozen students."""
    shapes = hashlib.sha256(str(sorted((name, tuple(p.shape)) for name, p in trainable.items())).encode())
    frozen = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, StudentAttention):
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    frozen.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
    return {
        "format": STATE_VERSION,
        "settings": dict(settings),
        "data": getattr(batches, "fingerprint", None),
        "micro_batches_an_epoch": len(batches),
        "trained_parameters": shapes.hexdigest()[:16],
        "frozen_students": frozen.hexdigest()[:16],
        "base_model": base,
    }


# What training continues from


@dataclass
class Counters:
    """Progress of a stage. Losses are evaluation losses (infinite before the first one); steps count from 0."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens the objective counted in those steps."""
    evaluated_step: int = -1
    initial_loss: float = math.inf
    last_loss: float = math.inf
    seconds: float = 0.0
    """Time spent in this stage up to the checkpoint."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``{"exp_avg/<parameter>": ...}`` for every slot of every parameter stepped so far."""
    return {
        f"{slot}/{name}": value
        for name, parameter in trainable.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def empty_slots(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], names: Iterable[str]
) -> dict[str, Tensor]:
    """Zeros for the ``names`` that are optimizer slots (as in ``optimizer_tensors``), also set in the new optimizer.

    Scalars (step counts) stay on the CPU, as in torch; other slots are shaped and sharded like their parameter.
    """
    slots: dict[str, Tensor] = {}
    for key in names:
        slot, _, name = key.partition("/")
        parameter = trainable.get(name)
        if parameter is not None:
            slots[key] = torch.zeros(()) if slot == "step" else torch.zeros_like(parameter, requires_grad=False)
            optimizer.state[parameter][slot] = slots[key]
    return slots


def require_same_identity(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``UserError`` naming the differences between the checkpoint at ``where`` and the current run."""
    changes = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict):
            inner = old if isinstance(old, dict) else {}
            plain = {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
            changes += [
                f"{key} was {inner.get(key)!r}, is {item!r} now"
                for key, item in plain.items()
                if inner.get(key) != item
            ]
        elif old != value:
            changes.append(f"{name.replace('_', ' ')} was {old!r}, is {value!r} now")
    if changes:
        raise UserError(
            f"{where} belongs to another run ({'; '.join(changes)}): use another run.dir, undo the change, or delete "
            "that folder to restart the stage"
        )
