"""The blocks in a run's folder: one folder per block, with its stage record and log.

blocks/layers-003-005/stages/transfer/   settings and, once finished, the trained weights and figures
blocks/layers-003-005/checkpoints/       resumable checkpoints
blocks/layers-003-005/metrics.jsonl      its log, in the format of a run's log
blocks/hidden/                           hidden states between blocks
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trenchcoat.config import Recipe, UserError
from trenchcoat.conversion.run import open_log
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder
from trenchcoat.runtime.runlog import RunLog, read_metrics
from trenchcoat.training import checkpoints

FOLDER = "blocks"
_NAME = re.compile(r"layers-(\d+)-(\d+)")


@dataclass(frozen=True)
class LayerBlock:
    """Layers [first, stop) of a model."""

    number: int
    first: int
    stop: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"layers-{self.first:03d}-{self.stop - 1:03d}"

    def __str__(self) -> str:
        last = self.stop - 1
        layers = f"layer {last}" if last == self.first else f"layers {self.first} to {last}"
        return f"block {self.number} ({layers})"


def cut(layers: int, size: int) -> list[LayerBlock]:
    """Blocks of ``size`` layers; the last one may have fewer."""
    return [LayerBlock(n, first, min(first + size, layers)) for n, first in enumerate(range(0, layers, size))]


def divide(blocks: Sequence[LayerBlock], processes: int) -> list[LayerBlock]:
    """Merge consecutive blocks into one per process, keeping the largest as small as possible; ``UserError`` when there
    are more processes than blocks. Only the last of ``blocks`` may be smaller than the others."""
    if processes > len(blocks):
        raise UserError(
            f"{processes} processes for {len(blocks)} blocks: start at most {len(blocks)} (torchrun "
            "--nproc_per_node), or lower blocks.size"
        )
    each, more = divmod(len(blocks), processes)
    starts = [number * each + max(0, number - (processes - more)) for number in range(processes)]
    stops = [*starts[1:], len(blocks)]
    pairs = zip(starts, stops, strict=True)
    return [LayerBlock(number, blocks[a].first, blocks[b - 1].stop) for number, (a, b) in enumerate(pairs)]


@dataclass(frozen=True)
class BlockIdentity:
    """What must be the same for all blocks of a run to stitch them."""

    base: str
    """Identity of the base weights."""
    text: str
    """Fingerprint of the tokens and their division into rows."""
    layers: int
    """Layers of the whole model."""


class BlockFolder:
    """The record of one block in the run's folder."""

    def __init__(self, recipe: Recipe, block: LayerBlock, identity: BlockIdentity | None = None) -> None:
        self.recipe, self.block, self.identity = recipe, block, identity
        self.directory = blocks_folder(recipe) / block.folder
        self._stage = RunFolder(self.directory)

    @contextmanager
    def log(self, parent: RunLog) -> Iterator[RunLog]:
        """The block's log, displayed like the run's log."""
        if parent.directory == self.directory:
            yield parent
            return
        with open_log(self.recipe, self.directory, display=parent.display) as log:
            log.label = f"{self.block}, "
            yield log

    def begin(self) -> None:
        """Record what its training depends on; ``UserError`` if it was started with something different."""
        assert self.identity is not None
        layers = {"layers": [self.block.first, self.block.stop]}
        self._stage.begin(TRANSFER, self.recipe, {**asdict(self.identity), **layers})

    def finish(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Save the trained weights, under the whole model's parameter names."""
        self._stage.finish(TRANSFER, tensors, facts)

    @property
    def finished(self) -> bool:
        """Whether its training is finished."""
        return self.result() is not None

    def result(self) -> dict[str, Any] | None:
        """Its figures once it is finished, else None."""
        return self._stage.result(TRANSFER)

    def require_finished(self) -> dict[str, Any]:
        """Its figures; ``UserError`` if it is not finished, or was trained on something different."""
        self.begin()
        result = self.result()
        if result is None:
            raise UserError(
                f"{self.block} is not finished: run `blocks train --block {self.block.number}`, or `blocks run`"
            )
        return result

    def last_evaluation(self) -> dict[str, Any] | None:
        """The newest evaluation line of its log."""
        lines = [line for line in read_metrics(self.directory) if line["kind"] == "eval"]
        return lines[-1] if lines else None

    def weights(self) -> dict[str, Tensor]:
        """The trained weights."""
        return self._stage.weights(TRANSFER)

    def steps_done(self, warn: Callable[[str], None]) -> int:
        """Optimizer steps in its newest intact checkpoint; -1 if there is none."""
        found = checkpoints.newest_checkpoint(self.directory / "checkpoints" / TRANSFER, warn)
        return -1 if found is None else found.step


def blocks_folder(recipe: Recipe) -> Path:
    """Folder of a run's blocks."""
    return Path(recipe.run.dir) / FOLDER


def hidden_folder(recipe: Recipe) -> Path:
    """Folder of the hidden states on disk."""
    own = recipe.blocks.hidden_dir
    return blocks_folder(recipe) / "hidden" if own is None else Path(own)


def found_blocks(recipe: Recipe) -> list[LayerBlock]:
    """The blocks in a run's folder, ordered by layer, whatever their sizes."""
    names = (_NAME.fullmatch(path.name) for path in blocks_folder(recipe).glob("layers-*"))
    spans = sorted((int(name.group(1)), int(name.group(2)) + 1) for name in names if name)
    return [LayerBlock(number, first, stop) for number, (first, stop) in enumerate(spans)]


def require_cover(blocks: list[LayerBlock], wanted: set[int]) -> None:
    """Raise ``UserError`` unless ``blocks`` hold each of the layers ``wanted`` exactly once."""
    held: dict[int, LayerBlock] = {}
    for block in blocks:
        for layer in range(block.first, block.stop):
            if layer in held:
                raise UserError(
                    f"layer {layer} is in two blocks, layers {held[layer].first} to {held[layer].stop - 1} and layers "
                    f"{block.first} to {block.stop - 1}: delete the folder of the one you do not want"
                )
            held[layer] = block
    missing = sorted(wanted - held.keys())
    if missing:
        raise UserError(f"layer {missing[0]} is in no block ({len(missing)} layers are not): run `blocks train` for it")


# The log of the whole transfer


def merge_logs(folders: Sequence[Path], log: RunLog, *, at_once: bool = False) -> int:
    """Merge the blocks' training and evaluation lines into ``log``, one line per step; returns the number of lines.

    Per-layer numbers are copied; ``loss`` and similar are means over the layers still trained at that step,
    the gradient norm is the total, seconds are summed over blocks, or the maximum if they were trained ``at_once``.
    Lines of an earlier call are dropped first.
    """
    lines: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for folder in folders:
        for line in read_metrics(folder):
            if line["kind"] in ("train", "eval") and line.get("stage") == TRANSFER:
                # an evaluation comes after its step
                lines.setdefault((line["step"], int(line["kind"] == "eval")), []).append(line)
    log.rewind(TRANSFER, -1)
    for (step, evaluation), parts in sorted(lines.items()):
        log.log("eval" if evaluation else "train", stage=TRANSFER, step=step, **dict(_together(parts, at_once)))
    log.sync()
    return len(lines)


def _together(parts: Sequence[Mapping[str, Any]], at_once: bool) -> Iterator[tuple[str, Any]]:
    layers = [max(1, sum(name.startswith("loss/layer_") for name in part)) for part in parts]
    names = dict.fromkeys(name for part in parts for name in part)
    for name in names:
        found = [(part[name], weight) for part, weight in zip(parts, layers, strict=True) if name in part]
        values = [value for value, _ in found]
        if name in ("kind", "stage", "step", "time") or name.startswith("speed/"):
            continue
        if "/layer_" in name or name == "lr":
            yield name, values[0] if "/layer_" in name else max(values)
        elif name == "grad_norm":
            yield name, sum(value * value for value in values) ** 0.5
        elif name == "tokens":
            yield name, max(values)
        elif name == "seconds":
            yield name, round(max(values) if at_once else sum(values), 3)
        else:
            yield name, sum(value * weight for value, weight in found) / sum(weight for _, weight in found)
