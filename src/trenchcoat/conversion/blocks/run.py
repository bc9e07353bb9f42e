"""Attention transfer block by block: a pass of rows through the blocks, one block of layers in memory at a time.

    for each pass over the rows:
        embed them
        for each block:      load it (prefetching the next one); run all its optimizer steps on this pass's
                             micro-batches; its (teacher) outputs are the next block's inputs; free it

The transfer is teacher-forced and layers learn independently, so this gives the students of the joint run, bit for bit
on one device in float32. Students and their optimizer are kept in the stage's checkpoints while other blocks are
trained. A killed run continues from them: the files on disk determine the next block and pass, and lost hidden states
are recomputed. :mod:`trenchcoat.conversion.blocks.stages` has the commands that use this.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trenchcoat.config import Recipe, TransferConfig
from trenchcoat.config.keep import restricted, whole_layers
from trenchcoat.conversion.blocks.data import ROWS, HiddenBatches, PassRows, Span
from trenchcoat.conversion.blocks.folder import BlockFolder, BlockIdentity, LayerBlock
from trenchcoat.conversion.blocks.hidden import HiddenFiles, HiddenMemory, HiddenShape, HiddenStates
from trenchcoat.conversion.blocks.model import BlockSource, ReadAhead, global_names
from trenchcoat.conversion.run import Stopped
from trenchcoat.conversion.variants import stage_facts, step_flops
from trenchcoat.data.batches import Batch, Batches
from trenchcoat.models.attach import attach_students, freeze_for_transfer, set_mode, students_of
from trenchcoat.models.hub import adapter_state
from trenchcoat.runtime import distributed
from trenchcoat.runtime.interrupts import StopSignal
from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.runtime.runlog import RunLog
from trenchcoat.training.loop import BatchSource, FitOptions, FitResult, fit
from trenchcoat.training.objectives import forward_decoder, initialise_from_text, transfer_objective
from trenchcoat.training.schedules import training_length

COLLECTED = "collected"
"""Subfolder, in the hidden-states folder, of the boundaries that ``blocks collect`` stores."""


class BlockRun:
    """The blocks of one recipe and their training in its run folder."""

    def __init__(
        self,
        recipe: Recipe,
        source: BlockSource,
        text: Batches,
        blocks: Sequence[LayerBlock],
        log: RunLog,
        evaluation_text: Callable[[], Batches],
        *,
        start: Batch | None = None,
    ) -> None:
        """``evaluation_text`` reads the rows to score; ``start`` is the batch for the initial values, for students
        that need one."""
        assert recipe.transfer is not None  # checked when the run was opened
        self.recipe, self.cfg = recipe, recipe.transfer
        self.source, self.text, self.blocks, self.log = source, text, list(blocks), log
        self.evaluation_text, self.start = evaluation_text, start
        self._flops: dict[int, float | None] = {}
        self.ahead = ReadAhead(source)
        self.folders = [BlockFolder(recipe, block, self.identity) for block in self.blocks]
        self.steps_done = distributed.from_main(lambda: [folder.steps_done(log.warning) for folder in self.folders])

    @cached_property
    def identity(self) -> BlockIdentity:
        """What all blocks of this run must have in common."""
        return BlockIdentity(self.source.fingerprint, self.text.fingerprint, self.source.layers)

    @cached_property
    def totals(self) -> list[int]:
        """Optimizer steps of every block."""
        return [training_length(self.stage(block), len(self.text))[1] for block in self.blocks]

    def stage(self, block: LayerBlock) -> TransferConfig:
        """Training settings of one block."""
        epochs = self.recipe.blocks.epochs
        return dataclasses.replace(self.cfg, epochs=epochs[block.number]) if epochs else self.cfg

    def close(self) -> None:
        """Stop reading ahead."""
        self.ahead.close()

    def __enter__(self) -> BlockRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Rows and where their hidden states are

    def rows(self, span: Span, *, of_all: bool = False) -> PassRows:
        """The rows of a pass on this process; with ``of_all``, also those of the other processes."""
        start = self.start if span.first == 0 else None
        return PassRows(span, self.text, self.cfg, totals=self.totals, start=start, of_all=of_all)

    def states(self, rows: PassRows, boundary: int, folder: Path | None, *, share: bool = False) -> HiddenStates:
        """Hidden states before block ``boundary``: in memory, or in ``folder``, reusing those already there.

        ``share``: the processes fill the folder together, each writing some of its files.
        """
        shape = HiddenShape(rows.rows, rows.tokens, self.source.hidden, self.source.dtype)
        if folder is None:
            return HiddenMemory(shape)
        identity = {
            **dataclasses.asdict(self.identity),
            "before_layer": self.blocks[boundary].first,
            "attention": self.recipe.model.attention,
            "batch_size": self.cfg.batch_size,
            "optimizer_steps": [rows.span.first, rows.span.until],
        }
        return HiddenFiles(
            folder,
            shape,
            identity,
            shard_bytes=self.recipe.blocks.shard_mib << 20,
            writer=distributed.rank() if share else 0,
            writers=distributed.size() if share else 1,
            warn=self.log.warning,
        )

    # One block

    def load(self, number: int, following: int | None) -> Any:
        """The model of a block; prefetches the tensors of ``following`` in the background."""
        block = self.blocks[number]
        model = self.ahead.block(block.first, block.stop)
        if following is not None:
            after = self.blocks[following]
            self.ahead.start(after.first, after.stop)
        return model

    def train(
        self, number: int, model: Any, rows: PassRows, states: HiddenStates, out: HiddenStates | None
    ) -> FitResult:
        """Train a block on a pass, writing its outputs to ``out``. Raises ``Stopped`` after Ctrl-C."""
        block, folder = self.blocks[number], self.folders[number]
        self.make_ready(model, block)
        if rows.start and self.steps_done[number] < 0:
            batch = rows.hidden(rows.start, states)
            initialise_from_text(model, {name: t.to(self.source.device) for name, t in batch.items()})
        batches = HiddenBatches(self.text, rows, states, pin=self.source.device.type == "cuda")

        def keep(batch: Batch, hidden_bTd: Tensor) -> None:
            """Write the outputs of a micro-batch."""
            if out is not None:
                out.write(batch[ROWS].tolist(), hidden_bTd)

        try:
            result = self.train_layers(folder, model, batches, self.stage(block), keep, until=rows.span.until)
        finally:
            batches.close()
        self.steps_done[number] = result.steps
        return result

    def make_ready(self, model: Any, block: LayerBlock) -> None:
        """Attach fresh students in transfer mode and freeze the rest of the model."""
        self.attach(model, block)
        set_mode(model, "transfer")
        freeze_for_transfer(model)

    def train_layers(
        self,
        folder: BlockFolder,
        model: Any,
        batches: BatchSource,
        cfg: TransferConfig,
        outputs: Callable[[Batch, Tensor], None],
        *,
        until: int | None = None,
        stop: StopSignal | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> FitResult:
        """Train a model of some layers and keep its record, including ``facts``, in ``folder``; ``outputs`` gets the
        hidden states after the last layer. Raises ``Stopped`` after Ctrl-C, or when ``stop`` is requested."""
        with folder.log(self.log) as log:
            distributed.from_main(folder.begin)
            objective = transfer_objective(self.cfg, outputs)
            flops, base = self._flops_per_token(model), self.source.fingerprint
            options = FitOptions(self.recipe.parallel.async_save, flops, base, until, stop)
            result = fit(model, batches, objective, cfg, log, stage=TRANSFER, options=options)
        if result.stopped:
            raise Stopped
        if result.finished:
            learned = global_names(adapter_state(model), folder.block.first)
            figures = dataclasses.asdict(stage_facts(TRANSFER, result)) | {"early": result.early} | dict(facts or {})
            distributed.from_main(lambda: folder.finish(learned, figures))
        return result

    def attach(self, model: Any, block: LayerBlock) -> None:
        """Attach fresh students to a block's model, identical to those of the whole model."""
        torch.manual_seed(self.recipe.run.seed)
        attach_students(model, restricted(self.recipe.student, range(block.first, block.stop)))

    def _flops_per_token(self, model: Any) -> float | None:
        """FLOPs per token of a training step; computed once per number of layers."""
        layers = int(model.config.num_hidden_layers)
        if layers not in self._flops:
            student = dataclasses.replace(self.recipe.student, keep=(), keep_softmax=())
            self._flops[layers] = step_flops(model.config, dataclasses.replace(self.recipe, student=student), self.cfg)
        return self._flops[layers]

    def fill(
        self,
        model: Any,
        rows: PassRows,
        states: HiddenStates,
        out: HiddenStates,
        wanted: list[list[int]] | None = None,
    ) -> None:
        """Write a block's outputs with the model's original attention to ``out``, for those of the ``wanted`` groups of
        rows (default: all) that are missing there."""
        if students_of(model):
            set_mode(model, "teacher")
        for group in rows.groups_missing(out, wanted):
            batch = {name: t.to(self.source.device) for name, t in rows.hidden(group, states).items()}
            out.write(group, forward_decoder(model, batch))
        out.finish()

    def embed(self, rows: PassRows, out: HiddenStates, wanted: list[list[int]]) -> None:
        """Write the embeddings of the ``wanted`` groups (inputs of the first layer) to ``out``."""
        groups = rows.groups_missing(out, wanted)
        if groups:
            model = self.source.embedding()
            for group in groups:
                out.write(group, forward_decoder(model, rows.text(group)))
        out.finish()

    # Blocks that a pass still has to train

    def trained(self, number: int, span: Span) -> bool:
        """Whether a block has done its steps of a pass; its last pass is done once its record is complete."""
        before_its_end = span.until < self.totals[number]
        return self.folders[number].finished or (before_its_end and self.steps_done[number] >= span.until)

    def learns(self, number: int) -> bool:
        """Whether a block has a layer that is linearized."""
        block, kept = self.blocks[number], whole_layers(self.recipe.student, self.source.groups)
        return any(index not in kept for index in range(block.first, block.stop))

    def to_train(self, span: Span) -> list[int]:
        """Blocks with steps left in a pass, in order."""
        return [n for n in range(len(self.blocks)) if self.learns(n) and not self.trained(n, span)]


class Stream:
    """Runs passes through the blocks; ``place`` is the folder of hidden states, None to keep them in memory."""

    def __init__(self, run: BlockRun, place: Path | None) -> None:
        self.run, self.place = run, place

    def _pass_folder(self, span: Span) -> Path | None:
        return None if self.place is None else self.place / span.folder

    def _states(self, rows: PassRows, boundary: int) -> HiddenStates:
        """Hidden states before a block in a pass, including those that already exist."""
        folder = self._pass_folder(rows.span)
        if folder is not None:
            folder = (
                folder / f"boundary-{boundary:03d}" / f"process-{distributed.rank():03d}-of-{distributed.size():03d}"
            )
        return self.run.states(rows, boundary, folder)

    def remove_stale(self, passes: Sequence[Span]) -> None:
        """Delete hidden states of passes that are not in ``passes``."""
        if self.place is None or not self.place.is_dir() or not distributed.is_main():
            return
        names = {span.folder for span in passes}
        for path in self.place.glob("pass-*"):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def go(self, span: Span) -> None:
        """Train every block on one pass, or on what is left of it. Raises ``Stopped`` after Ctrl-C."""
        run = self.run
        wanted = run.to_train(span)
        if wanted:
            rows = run.rows(span)
            run.log.info(
                f"pass {span.number + 1}: optimizer steps {span.first + 1} to {span.until}, {rows.rows} rows of "
                f"{rows.tokens} tokens, blocks {wanted[0]} to {wanted[-1]}"
            )
            states = self._inputs(rows, wanted[0])
            for number in range(wanted[0], wanted[-1] + 1):
                states = self._block(rows, number, states, last=wanted[-1], train=number in wanted)
            states.remove()
            distributed.barrier()
        folder = self._pass_folder(span)
        if folder is not None and distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)

    def _block(self, rows: PassRows, number: int, states: HiddenStates, *, last: int, train: bool) -> HiddenStates:
        """Run one block; returns the states after it (before it, if it is the last)."""
        run = self.run
        out = None if number == last else self._states(rows, number + 1)
        model = run.load(number, number + 1 if number < last else None)
        if train:
            run.train(number, model, rows, states, out)
        if out is None:
            return states
        run.fill(model, rows, states, out)
        states.remove()
        return out

    def _inputs(self, rows: PassRows, boundary: int) -> HiddenStates:
        """The hidden states before a block: from disk, or computed from the nearest earlier ones that are there."""
        below = self._states(rows, boundary)
        wanted = rows.groups_missing(below)
        start = boundary
        while start > 0 and rows.groups_missing(below, wanted):
            below.close()
            start = start - 1 if self.place is not None else 0
            below = self._states(rows, start)
        if rows.groups_missing(below, wanted):
            self.run.embed(rows, below, wanted)
        for number in range(start, boundary):
            out = self._states(rows, number + 1)
            self.run.fill(self.run.load(number, number + 1), rows, below, out, wanted)
            below.remove()
            below = out
        return below


class Collection:
    """Hidden states before every block, of all rows, kept on disk for blocks that are trained separately."""

    def __init__(self, run: BlockRun, place: Path) -> None:
        self.run, self.folder = run, place / COLLECTED
        self.span = Span(0, 0, max(run.totals))

    @cached_property
    def rows(self) -> PassRows:
        """All rows of the stage."""
        return self.run.rows(self.span, of_all=True)

    def states(self, boundary: int, *, share: bool = True) -> HiddenStates:
        """Hidden states before a block, including those that already exist."""
        return self.run.states(self.rows, boundary, self.folder / f"boundary-{boundary:03d}", share=share)

    @property
    def bytes(self) -> int:
        """Bytes of all hidden states."""
        shape = HiddenShape(self.rows.rows, self.rows.tokens, self.run.source.hidden, self.run.source.dtype)
        return len(self.run.blocks) * shape.bytes

    def fill(self, until: int) -> HiddenStates:
        """Compute the missing states before blocks 0 to ``until``; returns those before ``until``."""
        run, rows = self.run, self.rows
        states = self.states(0)
        run.embed(rows, states, rows.groups)
        for number in range(until):
            out = self.states(number + 1)
            distributed.barrier()
            states.refresh()
            missing = rows.groups_missing(out)
            run.log.info(f"collecting the outputs of {run.blocks[number]} for {len(missing)} micro-batches")
            if missing:
                run.fill(run.load(number, number + 1 if number + 1 < until else None), rows, states, out, missing)
            states.close()
            states = out
        distributed.barrier()
        states.refresh()
        return states

    def train(self, number: int) -> None:
        """Train one block on its collected inputs; lost or damaged ones are recomputed."""
        run = self.run
        if run.folders[number].finished:
            return
        states = self.states(number, share=False)
        if self.rows.groups_missing(states):
            states.close()
            run.log.warning(f"the inputs of {run.blocks[number]} are incomplete: collecting them first")
            states = self.fill(number)
        run.train(number, run.load(number, None), self.rows, states, None)
        states.close()
