"""Opening a run: every command that trains or scores in a run's folder starts with :func:`open_run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trenchcoat.config import DataConfig, LoraConfig, Recipe, StageConfig, UserError
from trenchcoat.config.paths import require_writable_folder
from trenchcoat.config.recipe_io import check_section
from trenchcoat.data.batches import Batches
from trenchcoat.data.load import load_batches
from trenchcoat.data.stream import StreamedBatches
from trenchcoat.models.attach import student_implementation
from trenchcoat.models.rotary import length_dependence
from trenchcoat.runtime import distributed
from trenchcoat.runtime.files import locked
from trenchcoat.runtime.runfolder import RunFolder, first_missing, remove_start
from trenchcoat.runtime.runlog import RunLog, SilentLog
from trenchcoat.runtime.trackers import MetricsTracker, open_trackers
from trenchcoat.students.registry import student_class
from trenchcoat.training.losses import check_loss

LANDMARK_ROWS = 4
"""Training rows from which students are initialised (`StudentAttention.initialise`)."""


class Stopped(KeyboardInterrupt):
    """The user asked to stop; everything is saved."""


@dataclass(frozen=True)
class OpenRun:
    """A run opened by one command: its folder, its log, and resources that are closed at the end."""

    recipe: Recipe
    folder: RunFolder
    log: RunLog
    resources: ExitStack

    def load_batches(
        self, tokenizer: Any, *, batch_size: int, data: DataConfig | None = None, rank: Any = None
    ) -> Batches:
        """The recipe's text (or that of ``data``) in micro-batches of ``batch_size`` rows; ``rank`` scores samples for
        ``data.select``. A collective."""
        data = data or self.recipe.data
        seed, say = self.recipe.run.seed, self.log.info
        load = partial(load_batches, data, tokenizer, batch_size=batch_size, seed=seed, rank=rank, say=say)
        # the first process of a node tokenizes, the others read its cache; a ranking needs all processes together
        batches = distributed.in_turns_per_node(load) if rank is None else load()
        if isinstance(batches, StreamedBatches):
            self.resources.callback(batches.close)
        return batches

    def write_environment(self, model: Any, attention: str, *, dtype: torch.dtype, device: torch.device) -> str:
        """Record versions, devices and attention implementations; returns the students' implementation."""
        operator = student_implementation(model, self.recipe.student, dtype=dtype, device=device)
        self.log.write_environment(implementation=operator, teacher_attention=attention)
        rotary = length_dependence(model.config)
        if rotary is not None:
            self.log.info(f"{rotary}; training rows have {self.recipe.data.seq_len} tokens")
        return operator


@contextmanager
def open_run(recipe: Recipe, stages: list[str], directory: Path | None = None) -> Iterator[OpenRun]:
    """Join the torchrun process group, lock the run's folder and open its log.

    ``directory`` is a folder to lock and log to instead of the run's own.
    A start that fails leaves no folder that was not there before.
    Raises ``UserError`` for an unknown student or objective, a folder that holds ``stages`` of another recipe, and a
    folder that another command is using.
    """
    check_names(recipe)
    with ExitStack() as stack:
        stack.enter_context(distributed.joined(recipe.parallel, recipe.model.device))
        folder = RunFolder(recipe.run.dir)
        folder.refuse_other_recipe(recipe, stages)
        held = directory or folder.directory
        distributed.from_main(lambda: require_writable_folder(held, "run.dir"))
        created = first_missing(held)
        distributed.from_main(lambda: stack.enter_context(locked(held)))
        if distributed.is_main():
            stack.push(lambda kind, *_: remove_start(held, created) if kind is not None else None)
        if recipe.run.threads is not None:
            torch.set_num_threads(recipe.run.threads)
        names = recipe.run.trackers if directory is None and distributed.is_main() else ()
        trackers = open_trackers(names, held, recipe.run.project)
        yield OpenRun(recipe, folder, stack.enter_context(open_log(recipe, held, trackers=trackers)), stack)


def idle_warning(cfg: StageConfig) -> str | None:
    """A sentence where a step has fewer micro-batches than there are processes, so that some have nothing to do."""
    processes = distributed.size()
    if cfg.accumulation >= processes:
        return None
    name = f"{'lora' if isinstance(cfg, LoraConfig) else 'transfer'}.accumulation"
    return (
        f"{name}={cfg.accumulation}: a step has fewer micro-batches than the {processes} processes that share them, so "
        f"{processes - cfg.accumulation} of them do nothing; {name}={processes} keeps all busy"
    )


def check_names(recipe: Recipe) -> None:
    """Raise ``UserError`` when the student, objective or data format of a recipe made in Python does not exist, or the
    student has no attention rows for ``transfer.xent_weight``."""
    student = student_class(recipe.student.name)
    if recipe.transfer is not None and recipe.transfer.xent_weight and not student.attention_rows:
        raise UserError(
            f"student.name={recipe.student.name} has no attention rows to compare; use transfer.xent_weight=0"
        )
    check_section(recipe.data, "data")
    if recipe.lora is not None:
        check_loss(recipe.lora.loss)


def open_log(
    recipe: Recipe, directory: Path, *, display: str | None = None, trackers: Sequence[MetricsTracker] = ()
) -> RunLog:
    """The log of a run or of a part of it, silent on all processes but the main one."""
    if not distributed.is_main():
        return SilentLog(directory)
    shown = recipe.run.progress if display is None else display
    return RunLog(directory, progress=shown, trackers=trackers)
