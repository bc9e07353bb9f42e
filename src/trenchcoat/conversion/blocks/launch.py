"""`trenchcoat blocks run --parallel`: one job per block, on this machine's devices or through Slurm.

    collect      the inputs of all blocks           local: in this process; Slurm: a job
    train        a job for each unfinished block, at most ``blocks.jobs`` at a time
    stitch       one adapter of all blocks          local: in this process; Slurm: a job

A block that fails is tried once more. This process locks the run's folder while blocks are trained, and each job locks
its block's folder; if another process holds that lock, the job waits. After the launcher is stopped or killed, the same
command continues: finished blocks are kept, and running jobs are found again
(:mod:`trenchcoat.conversion.blocks.jobs`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trenchcoat.config import Recipe, UsageError, UserError
from trenchcoat.config.units import in_words
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.folder import BlockFolder, LayerBlock, blocks_folder, found_blocks
from trenchcoat.conversion.blocks.jobs import STEPS, Job, Jobs, LocalJobs, SlurmJobs, Step, Task
from trenchcoat.conversion.blocks.select import with_selection
from trenchcoat.conversion.blocks.slurmoptions import parse_slurm
from trenchcoat.conversion.run import Stopped, open_run
from trenchcoat.evaluation.results import Outcome
from trenchcoat.runtime.files import holder, locked
from trenchcoat.runtime.interrupts import Interrupted, StopSignal, stop_on_signals
from trenchcoat.runtime.runfolder import TRANSFER
from trenchcoat.runtime.runlog import RunLog, Tracker

FOLDER = "jobs"
"""Folder next to the blocks' folders: job logs, and the record of running jobs."""
TRIES = 2
"""How often a job is started before it counts as failed."""
STATUS_SECONDS = 30.0
"""Time between two lines of progress while nothing changes."""


def launch_blocks(recipe: Recipe) -> Outcome:
    """Collect, train all blocks as jobs of ``blocks.launcher``, stitch. The same command continues.

    Raises ``UserError`` naming the blocks that failed twice, ``Stopped`` after Ctrl-C or SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("blocks run --parallel starts its own processes: run it without torchrun")
    recipe = with_selection(recipe)
    folder = blocks_folder(recipe) / FOLDER
    local = recipe.blocks.launcher == "local"
    options = None if local else parse_slurm(recipe.blocks.slurm)
    devices = _devices(recipe) if local else []
    recipe, learning = _settled(recipe, devices)
    with open_run(recipe, [TRANSFER], folder) as opened:
        log = opened.log
        jobs: Jobs
        if options is None:
            jobs = LocalJobs(folder, log, devices)
        else:
            name = f"trenchcoat-{Path(recipe.run.dir).name}"
            jobs = SlurmJobs(folder, log, options, name=name, at_once=recipe.blocks.jobs)
        if local and recipe.blocks.jobs is not None and recipe.blocks.jobs > len(devices):
            log.info(f"blocks.jobs={recipe.blocks.jobs}, but one job per GPU allows only {len(devices)} here")
        jobs.find_earlier()
        return _Launch(recipe, learning, jobs, log).run()


def _devices(recipe: Recipe) -> list[str]:
    """One device per concurrent job, as named in CUDA_VISIBLE_DEVICES; "" is the CPU."""
    wanted, jobs = recipe.model.device, recipe.blocks.jobs
    if wanted == "cpu" or not torch.cuda.is_available():
        return [""] * (jobs or 1)
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(count)] if visible is None else [one.strip() for one in visible.split(",")][:count]
    if ":" in wanted:
        index = wanted.partition(":")[2]
        if not index.isdecimal() or int(index) >= count:
            raise UserError(f"model.device={wanted}, but this machine has {count} GPUs (cuda:0 to cuda:{count - 1})")
        names = [names[int(index)]]
    return names[:jobs]


def _settled(recipe: Recipe, devices: Sequence[str]) -> tuple[Recipe, list[LayerBlock]]:
    """The recipe for the jobs, made independent of the machine they run on, and those of its blocks that learn."""
    if recipe.blocks.launcher == "slurm":
        if recipe.blocks.size is None and not found_blocks(recipe):
            raise UserError(
                "blocks.size is required with the launcher slurm, because the jobs' GPUs are not visible here: "
                "`trenchcoat blocks plan RECIPE --gpu-memory 80GB` computes how many layers fit"
            )
        here = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, device="cpu"))
        blocks, learning = blockstages.checked_blocks(here)
    else:
        blocks, learning = blockstages.checked_blocks(recipe, share=len(devices))
        device, threads = recipe.model.device.partition(":")[0], recipe.run.threads
        if devices[0] == "" and threads is None and len(devices) > 1:
            threads = max(1, torch.get_num_threads() // len(devices))
        recipe = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, device=device),
            run=dataclasses.replace(recipe.run, threads=threads),
        )
    size = blocks[0].stop - blocks[0].first
    return dataclasses.replace(recipe, blocks=dataclasses.replace(recipe.blocks, size=size)), learning


@dataclass
class _Piece:
    """The work of one job: training a block, or a collect or stitch step."""

    name: str
    title: str
    task: Task
    block: BlockFolder | None = None
    value: Any = None
    """What the job of a step returned."""
    done: bool = False
    tries: int = 0
    errors: list[str] = field(default_factory=list)
    waited_for: bool = False
    """Whether the wait for another process that holds the block has been logged."""


class _Launch:
    """One call of the launcher."""

    def __init__(self, recipe: Recipe, blocks: Sequence[LayerBlock], jobs: Jobs, log: RunLog) -> None:
        self.recipe, self.blocks, self.jobs, self.log = recipe, blocks, jobs, log
        self.in_process = jobs.kind == "local"

    def run(self) -> Outcome:
        """Collect, train and stitch."""
        pieces = [self._piece(block) for block in self.blocks]
        todo = [piece for piece in pieces if not piece.done]
        self._announce(pieces, todo)
        if todo:
            if not any(piece.name in self.jobs.running for piece in todo):
                self._step("collect")
            with locked(self.recipe.run.dir):
                self._work(todo, len(pieces))
        outcome = self._step("stitch")
        assert isinstance(outcome, Outcome)
        return outcome

    def _announce(self, pieces: Sequence[_Piece], todo: Sequence[_Piece]) -> None:
        running = [name for name in self.jobs.running if any(piece.name == name for piece in todo)]
        again = f"; jobs of an earlier launcher are still running: {', '.join(running)}" if running else ""
        self.log.info(
            f"{len(pieces)} blocks as {self.jobs.kind} jobs, {len(pieces) - len(todo)} already finished{again}; logs "
            f"in {self.jobs.folder}"
        )

    def _piece(self, block: LayerBlock) -> _Piece:
        record = BlockFolder(self.recipe, block)
        task = Task(self.recipe, "train", block.number)
        return _Piece(record.directory.name, str(block), task, record, done=record.finished)

    def _step(self, step: Step) -> Any:
        """Run `blocks collect` or `blocks stitch`."""
        if self.in_process:
            made = STEPS[step](self.recipe)
            if torch.cuda.is_initialized():  # jobs on the same GPU need the memory
                torch.cuda.empty_cache()
            return made
        piece = _Piece(step, step, Task(self.recipe, step))
        self._work([piece], 1)
        return piece.value

    # Jobs

    def _work(self, pieces: list[_Piece], total: int) -> None:
        """Run jobs until all pieces are done; ``UserError`` at the end if one failed twice."""
        with stop_on_signals() as stop:
            try:
                with self.log.progress("blocks" if total > 1 else pieces[0].name, total, total - len(pieces)) as shown:
                    self._wait(pieces, total, shown, stop)
            except Interrupted:
                self.jobs.stop()
                raise Stopped from None
            finally:
                if self.in_process and self.jobs.running:
                    self.jobs.stop()
        failed = [piece for piece in pieces if not piece.done]
        if failed:
            reasons = "; ".join(f"{piece.title}: {piece.errors[-1]}" for piece in failed)
            raise UserError(
                f"{len(failed)} of {total} jobs failed {TRIES} times: {reasons}. Finished blocks are kept; fix the "
                "cause and run the same command again"
            )

    def _wait(self, pieces: list[_Piece], total: int, shown: Tracker, stop: StopSignal) -> None:
        by_name = {piece.name: piece for piece in pieces}
        before: Any = None
        shown_at = 0.0
        while True:
            stop.check()
            for job in self.jobs.ended():
                if job.name in by_name:
                    self._settle(by_name[job.name], job)
            waiting = self._waiting(pieces)
            running = sum(piece.name in self.jobs.running for piece in pieces)
            done = sum(piece.done for piece in pieces)
            state = (done, running, len(waiting))
            if state != before or time.monotonic() - shown_at > STATUS_SECONDS:
                before, shown_at = state, time.monotonic()
                shown.update(total - len(pieces) + done, running=running, waiting=len(waiting))
            if not waiting and not running:
                return
            self._pause(stop)

    def _waiting(self, pieces: list[_Piece]) -> list[_Piece]:
        """Start as many pieces as there are free slots; returns those still waiting."""
        left = [p for p in pieces if not p.done and p.tries < TRIES and p.name not in self.jobs.running]
        ready = [piece for piece in left if self._free(piece)][: self.jobs.free_slots()]
        for piece in ready:
            piece.tries += 1
        if ready:
            self.jobs.start({piece.name: piece.task for piece in ready})
        return [piece for piece in left if not piece.done and piece not in ready]

    def _free(self, piece: _Piece) -> bool:
        """Whether no other process holds the piece; marks it done if another process has finished it."""
        if piece.block is None:
            return True
        if piece.block.finished:
            piece.done = True
            return False
        who = holder(piece.block.directory)
        if who is not None and not piece.waited_for:
            piece.waited_for = True
            self.log.info(f"{piece.title} is in use by {who}: waiting")
        return who is None

    def _settle(self, piece: _Piece, job: Job) -> None:
        """Record how a job ended."""
        reason = self.jobs.failure(job)
        if piece.block is None:
            piece.done = reason is None
            piece.value = job.handle.result() if piece.done else None
        elif reason is None and not self.jobs.appears(self._finished(piece.block), piece.block.directory):
            reason = (
                f"its job succeeded, but {piece.block.directory} has no result: is this folder shared by all nodes?"
            )
        else:
            piece.done = piece.block.finished
        if piece.done:
            self.log.info(f"{piece.title}: {self._figures(piece)}")
            return
        reason = reason or "its job succeeded, but wrote no result"
        piece.errors.append(f"{reason} (log {job.log})")
        piece.tries = max(piece.tries, 1)  # also for a job of an earlier launcher
        again = "retrying" if piece.tries < TRIES else "not retried"
        self.log.warning(f"{piece.title} failed: {piece.errors[-1]}; {again}")

    def _figures(self, piece: _Piece) -> str:
        facts = piece.block.result() if piece.block is not None else None
        if facts is None:
            return "done"
        return f"{facts['steps']} steps in {in_words(facts['seconds'])}, best evaluation loss {facts['best_loss']:.4g}"

    @staticmethod
    def _finished(block: BlockFolder) -> Any:
        return lambda: block.finished

    def _pause(self, stop: StopSignal) -> None:
        until = time.monotonic() + self.jobs.poll_seconds
        while time.monotonic() < until and not stop.requested:
            time.sleep(min(0.2, self.jobs.poll_seconds))
