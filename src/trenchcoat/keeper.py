"""Which checkpoints of a stage are on disk, which is the best, which may go; and the one still being written.

The main process decides what is there and tells the others, so that all continue from the same checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat import checkpoint, distributed
from trenchcoat.checkpoint import Checkpoint, CheckpointWriter, CorruptFileError
from trenchcoat.students import StudentAttention


class Keeper:
    """The checkpoints of one stage under ``root``; ``keep`` of them are kept, and those they call the best.

    With ``background`` several processes write while training goes on; ``finish`` waits for that.
    """

    def __init__(self, root: Path, keep: int, warn: Callable[[str], None], *, background: bool) -> None:
        self.root, self.keep, self.warn = root, max(keep, 1), warn
        self.best: dict[int, int] = {}
        """Step of every sound checkpoint -> the best step it refers to."""
        self._side = distributed.side_group() if background and distributed.size() > 1 else None
        self._writing: tuple[CheckpointWriter, int] | None = None

    def write(self, step: int, best: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step`` (begin to, in the background); raises ``SaveError``."""
        self.finish()
        self._writing = CheckpointWriter(self.root, step, groups, state, self._side), best
        if self._side is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written, then delete those no longer needed."""
        if self._writing is None:
            return
        (writer, best), self._writing = self._writing, None
        writer.finish()
        self.best[writer.step] = best
        newest = sorted(self.best)[-self.keep :]
        kept = {*newest, *(self.best[step] for step in newest)}
        if distributed.is_main():
            checkpoint.prune_checkpoints(self.root, kept)
        self.best = {step: best for step, best in self.best.items() if step in kept}

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint; damaged ones are named. All sound ones up to it are known afterwards."""

        def look() -> dict[str, Any]:
            found = checkpoint.newest_checkpoint(self.root, self.warn)
            return {"found": found, "best": {} if found is None else self._sound(found)}

        seen = distributed.from_main(look)
        self.best = dict(seen["best"])
        newest: Checkpoint | None = seen["found"]
        return newest

    def read(self, step: int) -> Checkpoint:
        """A checkpoint by its step; raises ``CorruptFileError``."""
        path = checkpoint.checkpoint_path(self.root, step)
        return distributed.from_main(lambda: checkpoint.read_checkpoint(path))

    def _sound(self, newest: Checkpoint) -> dict[int, int]:
        best: dict[int, int] = {}
        for path in checkpoint.checkpoint_folders(self.root):
            try:
                older = newest if path == newest.path else checkpoint.read_checkpoint(path)
            except CorruptFileError:
                continue
            if older.step <= newest.step:
                best[older.step] = older.state["counters"]["best_step"]
        return best


def identity(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], batches: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued: settings, data, trained names, base and frozen students."""
    shapes = hashlib.sha256(str(sorted((name, tuple(p.shape)) for name, p in trainable.items())).encode())
    frozen = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, StudentAttention):
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    frozen.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
    return {
        "settings": dict(settings),
        "data": getattr(batches, "fingerprint", None),
        "micro_batches_an_epoch": len(batches),
        "trained_parameters": shapes.hexdigest()[:16],
        "frozen_students": frozen.hexdigest()[:16],
        "base_model": checkpoint.fingerprint(model) if hasattr(model, "config") else None,
    }
