"""Which checkpoints of a stage are on disk, which may go; and the one still being written.

The main process decides what is there and tells the others, so that all continue from the same checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat.models.identity import fingerprint
from trenchcoat.runtime import distributed
from trenchcoat.students import StudentAttention
from trenchcoat.training import checkpoints
from trenchcoat.training.checkpoints import Checkpoint, CheckpointWriter

FORMAT = 2
"""Of what a checkpoint holds; 2: the best weights are in it."""


class Keeper:
    """The checkpoints of one stage under ``root``; the newest ``keep`` of them are kept.

    With ``background`` several processes write while training goes on; ``finish`` waits for that.
    """

    def __init__(self, root: Path, keep: int, warn: Callable[[str], None], *, background: bool) -> None:
        self.root, self.keep, self.warn = root, max(keep, 1), warn
        self._side = distributed.side_group() if background and distributed.size() > 1 else None
        self._writing: CheckpointWriter | None = None

    def write(self, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step`` (begin to, in the background); raises ``SaveError``."""
        self.finish()
        self._writing = CheckpointWriter(self.root, step, groups, state, self._side)
        if self._side is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written, then delete those no longer needed."""
        if self._writing is None:
            return
        writer, self._writing = self._writing, None
        writer.finish()
        if distributed.is_main():
            checkpoints.prune_checkpoints(self.root, self.keep)

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint; damaged ones are named."""
        found: Checkpoint | None = distributed.from_main(lambda: checkpoints.newest_checkpoint(self.root, self.warn))
        return found


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
        "format": FORMAT,
        "settings": dict(settings),
        "data": getattr(batches, "fingerprint", None),
        "micro_batches_an_epoch": len(batches),
        "trained_parameters": shapes.hexdigest()[:16],
        "frozen_students": frozen.hexdigest()[:16],
        "base_model": fingerprint(model) if hasattr(model, "config") else None,
    }
