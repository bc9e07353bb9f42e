"""Attention transfer with a range of layers per process: a forward-only pipeline.

    process 0      embeds a micro-batch, runs it through its layers while training their students, sends the outputs on
    process 1      receives them, runs them through the next layers, sends the outputs on
    the last one   sends nothing

Weights are read once. No gradients are sent back, so no process waits for a reply, and hidden states are not stored: a
process holds only a few micro-batches of them (:mod:`trenchcoat.conversion.blocks.chain`). All processes go through the
micro-batches of the joint run in the same order, which follows from the recipe alone; each trains its layers with the
ordinary training loop, as if it were the only process, in its own block folder. Micro-batches that a process does not
train on (it is ahead of the others after a kill, finished, or stopped early) are run forward and passed on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trenchcoat.config import TransferConfig, UserError
from trenchcoat.config.keep import whole_layers
from trenchcoat.config.units import gib, tera
from trenchcoat.conversion.blocks.chain import (
    END,
    FAILED,
    QUEUED,
    START,
    STOP,
    TRAIN,
    VALIDATION,
    BatchKey,
    Chain,
    Closed,
)
from trenchcoat.conversion.blocks.data import TextOrder
from trenchcoat.conversion.blocks.folder import BlockFolder, LayerBlock
from trenchcoat.conversion.blocks.run import BlockRun
from trenchcoat.conversion.run import Stopped
from trenchcoat.data.batches import Batch, Batches
from trenchcoat.models.attach import set_mode, students_of
from trenchcoat.models.shapes import shapes_of
from trenchcoat.planning.blocks.size import measure_block
from trenchcoat.planning.footprint import StepSizes
from trenchcoat.planning.plan import with_reserve
from trenchcoat.runtime import distributed
from trenchcoat.runtime.interrupts import Interrupted, StopSignal, stop_on_signals
from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.training import checkpoints
from trenchcoat.training.objectives import forward_decoder, initialise_from_text
from trenchcoat.training.schedules import evaluation_batches, step_batches, training_length


class Position(NamedTuple):
    """Progress of a process: optimizer steps done (-1 before the first checkpoint), and whether the evaluation due
    after them, if any, is done."""

    step: int
    evaluated: bool


FINISHED = Position(1 << 40, True)
"""The position of a process whose training is finished."""


class Pipeline:
    """The transfer of a run whose layers are split into ``ranges``, one per process."""

    def __init__(self, run: BlockRun, ranges: Sequence[LayerBlock], *, host_memory: float) -> None:
        """``host_memory``: bytes that this process may use. Raises ``UserError``, the same on all processes, if a range
        does not fit or contains blocks with different numbers of epochs."""
        self.run, self.ranges = run, list(ranges)
        self.block = self.ranges[distributed.rank()]
        self.folder = BlockFolder(run.recipe, self.block, run.identity)
        distributed.from_main(self._require_common_epochs)
        self._require_room(host_memory)

    def go(self) -> None:
        """Train what is left. Raises ``Stopped`` after Ctrl-C on any process, ``ProcessLost`` if another failed."""
        run = self.run
        positions = self._positions()
        if min(positions) == FINISHED:
            return
        self._announce(positions)
        block = self.block
        read = run.source.read
        model = distributed.one_by_one_per_node(
            lambda: run.source.build(block.first, block.stop, read(block.first, block.stop))
        )
        start = run.start is not None and min(positions).step < 0
        items = schedule(run.text, [self._settings(one) for one in self.ranges], min(positions), start=start)
        with stop_on_signals() as stop:
            chain = Chain(run.source.hidden, run.source.dtype, pin=run.source.device.type == "cuda")
            feed = Feed(run, chain, model, items, stop)
            try:
                code, failure = self._work(feed, positions[distributed.rank()], start=start)
                chain.close(code)
            finally:
                chain.abandon()
            self._settle(failure, stopped=code == STOP or stop.requested)
        del model, feed
        gc.collect()
        if run.source.device.type == "cuda":
            torch.cuda.empty_cache()

    def _work(self, feed: Feed, position: Position, *, start: bool) -> tuple[int, UserError | None]:
        """Run this process's part; returns the code it ended with, and its failure if any."""
        try:
            with distributed.alone():
                self._train(feed, position, start=start)
        except (Stopped, Interrupted):
            return STOP, None
        except Closed as closed:
            return closed.code, None
        except UserError as error:
            feed.chain.ask(FAILED)
            return FAILED, error
        return END, None

    def _train(self, feed: Feed, position: Position, *, start: bool) -> None:
        learning = position != FINISHED
        if learning:
            self.run.make_ready(feed.model, self.block)
        if start:
            feed.start(learning and position.step < 0)
        if learning:
            cfg = self._settings(self.block)
            alone = {"at_once": True}
            self.run.train_layers(self.folder, feed.model, feed, cfg, feed.pass_outputs, stop=StopSignal(), facts=alone)
        feed.rest()

    def _settle(self, failure: UserError | None, *, stopped: bool) -> None:
        """Make all processes end the same way; a collective."""
        rank, size = distributed.rank(), distributed.size()
        text = None if failure is None else f"process {rank} of {size} failed ({type(failure).__name__}: {failure})"
        first = distributed.first_of(text)
        anybody = distributed.largest(float(stopped)) > 0
        if failure is not None:
            raise failure
        if first is not None:
            raise distributed.ProcessLost(f"{first}, so process {rank} stops too")
        if anybody:
            raise Stopped

    # Before training

    def _settings(self, block: LayerBlock) -> TransferConfig:
        """Training settings of a range: those of its first block."""
        return self.run.stage(next(one for one in self.run.blocks if one.first == block.first))

    def _require_common_epochs(self) -> None:
        epochs = self.run.recipe.blocks.epochs
        for held in self.ranges if epochs else []:
            members = [one.number for one in self.run.blocks if held.first <= one.first < held.stop]
            given = {epochs[number] for number in members}
            if len(given) > 1:
                raise UserError(
                    f"blocks.epochs gives blocks {members[0]} to {members[-1]} {sorted(given)} epochs, but with "
                    f"blocks.ranks=pipeline process {held.number} trains them together: give them the same number, or "
                    "set blocks.ranks=data"
                )

    def _require_room(self, host_memory: float) -> None:
        run, on_gpu = self.run, self.run.source.device.type == "cuda"
        layers = max(block.stop - block.first for block in self.ranges)
        shapes, seq_len = shapes_of(run.source.config), run.recipe.data.seq_len
        step = StepSizes(shapes, run.recipe.student, run.cfg, seq_len, run.source.dtype.itemsize)
        needed = measure_block(step, layers, gpu=on_gpu).device_bytes
        free = torch.cuda.mem_get_info(run.source.device)[0] if on_gpu else host_memory
        short = (with_reserve(needed) if on_gpu else needed) > free
        shortage = distributed.first_of(
            f"{layers} layers per process need {gib(needed)}, but process {distributed.rank()} has {gib(free)} free: "
            "start more processes (torchrun --nproc_per_node), lower transfer.batch_size, or set blocks.ranks=data, "
            "which holds one block at a time"
            if short
            else None
        )
        if shortage is not None:
            raise UserError(shortage)

    def _positions(self) -> list[Position]:
        """The position of each process; a collective."""
        mine, size, rank = self._position(), distributed.size(), distributed.rank()
        numbers = [0.0] * (2 * size)
        numbers[2 * rank : 2 * rank + 2] = float(mine.step), float(mine.evaluated)
        everyone = distributed.all_sum(numbers)
        return [Position(round(everyone[2 * i]), everyone[2 * i + 1] > 0) for i in range(size)]

    def _position(self) -> Position:
        kept = whole_layers(self.run.recipe.student, self.run.source.groups)
        if self.folder.finished or kept.issuperset(range(self.block.first, self.block.stop)):
            return FINISHED
        # fit reads the same checkpoint, and warns about damaged ones
        found = checkpoints.newest_checkpoint(self.folder.directory / "checkpoints" / TRANSFER, lambda text: None)
        if found is None:
            return Position(-1, False)
        return Position(found.step, found.state["counters"]["evaluated_step"] == found.step)

    def _announce(self, positions: Sequence[Position]) -> None:
        run = self.run
        ranges = "; ".join(f"{one.first} to {one.stop - 1}" for one in self.ranges)
        row = run.recipe.data.seq_len * run.source.hidden * run.source.dtype.itemsize
        most = 2 * QUEUED + 1
        run.log.info(
            f"pipeline: {len(self.ranges)} processes hold layers {ranges}; each buffers at most {most} micro-batches "
            f"of hidden states ({tera(most * run.cfg.batch_size * row)})"
        )
        if max(positions).step >= 0:
            steps = [
                "finished" if one == FINISHED else f"step {one.step}" if one.step >= 0 else "new" for one in positions
            ]
            at = ", ".join(steps)
            run.log.info(f"pipeline: continuing; the processes are at: {at}. Those ahead only forward hidden states")


def schedule(text: Batches, settings: Sequence[TransferConfig], first: Position, *, start: bool) -> Iterator[BatchKey]:
    """All micro-batches after ``first`` that a process with any of ``settings`` (which differ only in epochs) requests,
    in order; with ``start``, the rows for the initial values come first."""
    cfg = settings[0]
    lengths = [training_length(one, len(text)) for one in settings]
    micro_batches, ends = max(number for number, _ in lengths), {steps for _, steps in lengths}
    validation = evaluation_batches(cfg, text.validation_batches())
    if start:
        yield BatchKey(START, 0)
    for step in range(max(first.step, 0), max(ends) + 1):
        due = step % cfg.eval_every == 0 or step in ends
        if due and not (step == first.step and first.evaluated):
            yield from (BatchKey(VALIDATION, index) for index in range(validation))
        yield from (BatchKey(TRAIN, index) for index in step_batches(cfg, step, micro_batches))


class Feed(TextOrder):
    """The data of ``fit``, as it arrives through the chain.

    Scheduled micro-batches that are not requested are run forward and passed on. Raises ``Interrupted`` when the
    processes stop, ``Closed`` when one of them has failed or all are done.
    """

    def __init__(self, run: BlockRun, chain: Chain, model: Any, items: Iterator[BatchKey], stop: StopSignal) -> None:
        super().__init__(run.text)
        self.run, self.chain, self.model = run, chain, model
        self._items, self._stop = items, stop
        self._embedding = run.source.embedding() if chain.first else None
        self._at: BatchKey | None = None
        self._asked = self._resting = False

    def train_batch(self, index: int) -> Batch:
        """Micro-batch ``index``."""
        return self._get(BatchKey(TRAIN, index))

    def validation_batch(self, index: int) -> Batch:
        """Validation micro-batch ``index``."""
        return self._get(BatchKey(VALIDATION, index))

    def start(self, fresh: bool) -> None:
        """Process the rows for the initial values; ``fresh``: this process's students still need them."""
        batch = self._on_device(self._take(next(self._items)))
        if fresh:
            initialise_from_text(self.model, batch)
        self._pass_on(BatchKey(START, 0), batch)

    def pass_outputs(self, batch: Batch, hidden_bTd: Tensor) -> None:
        """Send the outputs of the last requested micro-batch, once."""
        if self._at is not None and not self.chain.last:
            self.chain.send(self._at, hidden_bTd, batch["attention_mask"])
        self._at = None

    def rest(self) -> None:
        """Pass on all remaining micro-batches."""
        self._resting = True
        self.chain.done()
        for item in self._items:
            self._pass_on(item, self._on_device(self._take(item)))

    def _get(self, wanted: BatchKey) -> Batch:
        for item in self._items:
            batch = self._take(item)
            if item == wanted:
                self._at = item
                return batch
            self._pass_on(item, self._on_device(batch))
        raise RuntimeError(f"micro-batch {wanted} is not in the common schedule of the processes")

    def _take(self, item: BatchKey) -> Batch:
        try:
            self._check_for_stop()
            if self._embedding is not None:
                return self._embedded(item)
            found = self.chain.receive(item)
        except Closed as closed:
            if closed.code == STOP:
                raise Interrupted from closed
            raise
        return {"inputs_embeds": found.hidden_bTd, "attention_mask": found.padding_bT}

    def _check_for_stop(self) -> None:
        """On the first process: whether all processes should end here. On the others: send it any stop request."""
        if not self.chain.first:
            if self._stop.requested and not self._asked:
                self._asked = True
                self.chain.ask(STOP)
            return
        code = STOP if self._stop.requested else self.chain.asked()
        if code is None and self._resting and self.chain.all_done():
            code = END
        if code is not None:
            raise Closed(code)

    def _embedded(self, item: BatchKey) -> Batch:
        text = self.run.text
        assert self._embedding is not None
        if item.kind == START:
            assert self.run.start is not None
            batch = self.run.start
        else:
            batch = text.train_batch(item.number) if item.kind == TRAIN else text.validation_batch(item.number)
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return {"inputs_embeds": forward_decoder(self._embedding, tokens), "attention_mask": batch["attention_mask"]}

    def _on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.run.source.device, non_blocking=True) for name, tensor in batch.items()}

    def _pass_on(self, item: BatchKey, batch: Batch) -> None:
        """Run a micro-batch forward and send the outputs, unless this is the last process."""
        if self.chain.last:
            return
        students = bool(students_of(self.model))
        if students:
            set_mode(self.model, "teacher")
        self.chain.send(item, forward_decoder(self.model, batch), batch["attention_mask"])
        if students:
            set_mode(self.model, "transfer")
