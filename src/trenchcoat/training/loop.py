"""The training loop of every stage: ``fit(model, batches, objective, cfg, run, stage=...)``.

It runs AdamW over the parameters that require gradients, with a schedule, clipping, evaluation, best-weight tracking,
early stopping, saving and resuming. A run killed at any moment and restarted ends with the same numbers as an
uninterrupted one: weights, optimizer, schedule and data position are restored, the log is rewound, and every
micro-batch seeds the random generators by its index.

Several processes split the micro-batches of each optimizer step; the step itself is the same, so a run may be continued
with a different number of processes. They all stop together when one of them gets a stop signal or finds a NaN.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from trenchcoat.config import StageConfig, UserError
from trenchcoat.runtime import distributed
from trenchcoat.runtime.interrupts import Interrupted, StopSignal, stop_on_signals
from trenchcoat.runtime.runlog import RunLog, Tracker
from trenchcoat.runtime.sharding import MasterCopies
from trenchcoat.training.checkpoints import (
    CheckpointManager,
    Counters,
    empty_slots,
    identity,
    optimizer_tensors,
    require_same_identity,
)
from trenchcoat.training.gradients import (
    BEST,
    NonFiniteGradient,
    ParamGroups,
    average_and_clip,
    clip_groups,
    rate_factors,
)
from trenchcoat.training.metrics import MetricSums, speed
from trenchcoat.training.objectives import IDLE, Objective, first_nonfinite
from trenchcoat.training.schedules import evaluation_batches, step_batches, training_length

if TYPE_CHECKING:
    from trenchcoat.data.batches import Batch

_FREE_TO_CHANGE = {
    "epochs", "max_steps", "save_every", "keep_checkpoints", "early_stopping", "early_stopping_threshold",
    "gradient_checkpointing", "teacher_logits",
}  # fmt: skip
"""Settings that may differ between a run and its continuation."""


class NonFiniteLoss(UserError):
    """A loss or gradient became NaN or infinite, in ``stage``, during ``step``, first in ``where``."""

    def __init__(self, stage: str, step: int, where: str, what: str) -> None:
        self.stage, self.step, self.where = stage, step, where
        super().__init__(
            f"{stage}: the {what} is not finite at step {step}, first in {where}. Checkpoints made before it are "
            f"intact; lower {stage}.lr, set {stage}.clip, or use model.dtype=float32 or bfloat16"
        )


class BatchSource(Protocol):
    """The data that ``fit`` needs: random access by micro-batch index, and a validation set."""

    def __len__(self) -> int:
        """Micro-batches per epoch."""

    def train_batch(self, index: int) -> Batch:
        """Micro-batch ``index``, counted over epochs; always the same for the same index."""

    def validation_batches(self) -> int:
        """Number of validation micro-batches."""

    def validation_batch(self, index: int) -> Batch:
        """Validation micro-batch ``index``."""


@dataclass(frozen=True)
class FitResult:
    """How a stage ended. Losses are evaluation losses; ``initial_loss`` is that of step 0."""

    steps: int
    initial_loss: float
    best_loss: float
    """Loss of the final weights under ``restore_best``; with per-layer groups, the mean of their best losses."""
    best_step: int
    """With per-layer groups, the latest of their best steps."""
    final_loss: float
    seconds: float
    tokens: int
    resumed_from: int | None
    stopped: bool
    """Ctrl-C (or SIGTERM) ended it: a checkpoint is saved, and the caller must stop too."""
    early: bool
    """Early stopping ended it."""
    finished: bool
    """The stage is complete; False if it was stopped, or only reached ``until``."""


@dataclass(frozen=True)
class FitOptions:
    """Options of ``fit`` that are not in the recipe."""

    background_saves: bool = False
    """With several processes, write checkpoints while training continues."""
    flops_per_token: float | None = None
    """FLOPs of a training step, for the logged utilization."""
    base: str | None = None
    """Fingerprint of the frozen base weights; checkpoints over another base are refused."""
    until: int | None = None
    """Save and return after this optimizer step; another call continues."""
    stop: StopSignal | None = None
    """Stop signal of a caller that handles Ctrl-C and SIGTERM itself."""


def fit(
    model: nn.Module,
    batches: BatchSource,
    objective: Objective,
    cfg: StageConfig,
    run: RunLog,
    *,
    stage: str,
    options: FitOptions | None = None,
) -> FitResult:
    """Train the parameters of ``model`` that require gradients (float32); it ends with the best weights.

    ``stage`` names the checkpoint folder and the log lines. A finished stage is loaded, not trained again.
    Raises ``UserError`` if there is nothing to train or the checkpoint has other settings, ``NonFiniteLoss`` naming
    layer and step, ``SaveError`` for a full disk. After Ctrl-C it saves and returns with ``stopped`` set.
    """
    options = options or FitOptions()
    loop = _Loop(model, batches, objective, cfg, run, stage, options)
    loop.resume()
    stopped = False
    listening = stop_on_signals() if options.stop is None else nullcontext(options.stop)
    with listening as asked, run.progress(stage, loop.total, loop.at.step) as display:
        try:
            loop.run(asked, display)
        except Interrupted:
            stopped = True
            loop.abandon_step()
        loop.checkpoints.finish()
    return loop.finish(stopped)


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        batches: BatchSource,
        objective: Objective,
        cfg: StageConfig,
        log: RunLog,
        stage: str,
        options: FitOptions,
    ) -> None:
        self.model, self.batches, self.objective = model, batches, objective
        self.cfg, self.log, self.stage, self.options = cfg, log, stage, options
        self.trainable = trainable(model, stage)
        self.device = next(iter(self.trainable.values())).device
        self.micro_batches, self.total = training_length(cfg, len(batches))
        self.masters = MasterCopies(self.trainable)
        self.until = self.total if options.until is None else min(options.until, self.total)
        members = clip_groups(model, self.trainable, cfg.clip_scope, self.masters.parameters)
        self.groups = ParamGroups(members, cfg, self.total, rate_factors(model, self.trainable, cfg))
        self.optimizer = torch.optim.AdamW(
            self.groups.for_optimizer(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
        )
        self.checkpoints = CheckpointManager(
            log.checkpoints(stage), cfg.keep_checkpoints, log.warning, background=options.background_saves
        )
        self.identity = identity(model, self.trainable, batches, _settings(cfg), options.base)
        self.at = Counters()
        self.saved_step = -1
        self.resumed_from: int | None = None
        self.began = time.monotonic()

    # Stepping

    def run(self, stop: StopSignal, display: Tracker) -> None:
        """Evaluate, save and step until done."""
        at, cfg = self.at, self.cfg
        while True:
            if at.evaluated_step != at.step and (at.step % cfg.eval_every == 0 or self.ended):
                self.evaluate(stop)
            over = self.ended or at.step >= self.until
            if (over or at.step % cfg.save_every == 0) and self.saved_step != at.step:
                self.save()
            if over:
                return
            self.train_step(stop, display)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or early stopping has ended them."""
        return self.at.step >= self.total or self.groups.stopped

    @property
    def seconds(self) -> float:
        """Time spent in this stage, including earlier runs."""
        return time.monotonic() - self.began

    def _run_all(
        self, mine: Iterable[Batch | None], spare: Callable[[], Batch], step: int, stop: StopSignal
    ) -> MetricSums:
        """Run the objective on this process's micro-batches; returns the sums over all processes.

        None stands for a micro-batch of another process: the model's collectives need every process, so ``spare`` is
        run instead and not counted.
        """
        sums = MetricSums()
        for place in mine:
            if distributed.size() == 1:
                stop.check()
            given = spare() if place is None else place
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in given.items()}
            if place is None:
                batch[IDLE] = torch.ones(())
            metrics = self.objective(self.model, batch)
            sums.add(metrics, batch, counts=place is not None)
            if distributed.size() == 1:
                self._require_finite(sums, step)
        sums.reduce(stop.requested)
        self._require_finite(sums, step)
        return sums

    def train_step(self, stop: StopSignal, display: Tracker) -> None:
        """One optimizer step: accumulate, check, clip, update, log."""
        at = self.at
        began = time.monotonic()
        indices = step_batches(self.cfg, at.step, self.micro_batches)
        mine = (None if index is None else self._train_batch(index) for index in distributed.share(indices))
        with torch.enable_grad():
            sums = self._run_all(mine, lambda: self.batches.train_batch(indices[0]), at.step + 1, stop)
        rate = self.groups.set_rates(self.optimizer, at.step)
        self.masters.reduce()
        try:
            norm = average_and_clip(self.groups.active(), len(indices), self.cfg.clip)
        except NonFiniteGradient as error:
            raise NonFiniteLoss(self.stage, at.step + 1, error.group, "gradient norm") from error
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.publish()
        at.step += 1
        numbers = sums.means(weighted=False)
        at.tokens += round(sums.tokens)
        rates = speed(self.device, round(sums.tokens), time.monotonic() - began, self.options.flops_per_token)
        line = {**numbers, "lr": rate, "grad_norm": norm, "tokens": at.tokens, "seconds": round(self.seconds, 3)}
        self.log.log("train", stage=self.stage, step=at.step, **line, **rates)
        display.update(at.step, loss=numbers["loss"], eval=at.last_loss, lr=rate)
        if sums.stop:
            raise Interrupted

    def _train_batch(self, index: int) -> Batch:
        """Micro-batch ``index``; seeds the generators (for dropout) by it, so it is the same in any process."""
        torch.manual_seed(hash((getattr(self.batches, "seed", 0), index)) % (1 << 62))
        return self.batches.train_batch(index)

    def _require_finite(self, sums: MetricSums, step: int) -> None:
        broken = sums.broken()
        if not broken:
            return
        layers = sorted(name for name in broken if "/layer_" in name)
        if layers:
            where = _readable(layers[0].split("/", 1)[1])
        else:
            assert sums.suspect is not None
            found = first_nonfinite(self.model, self.objective, sums.suspect)
            where = _readable(distributed.first_of(found) or "the loss itself")
        raise NonFiniteLoss(self.stage, step, where, "loss")

    def evaluate(self, stop: StopSignal) -> None:
        """Token-weighted mean loss over the validation batches; updates schedule, best weights and early stopping."""
        began, at = time.monotonic(), self.at
        rows = evaluation_batches(self.cfg, self.batches.validation_batches())
        if not rows:
            raise UserError(f"{self.stage}: there are no validation rows; set data.validation_rows above 0")
        look = self.batches.validation_batch
        mine = (None if place is None else look(place) for place in distributed.share(range(rows)))
        with torch.no_grad():
            sums = self._run_all(mine, lambda: look(0), at.step, stop)
        numbers = sums.means(weighted=True)
        at.last_loss, at.evaluated_step = numbers["loss"], at.step
        if at.step == 0:
            at.initial_loss = at.last_loss
        for group in self.groups.members:
            group.observe(numbers, at.step)
        self.saved_step = -1
        spent = round(time.monotonic() - began, 3)
        self.log.log("eval", stage=self.stage, step=at.step, **numbers, tokens=at.tokens, seconds=spent)
        if sums.stop:
            raise Interrupted

    def abandon_step(self) -> None:
        """After an interruption: drop the unfinished step and save the last finished one."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.saved_step != self.at.step:
            self.save()

    # Saving and resuming

    def save(self) -> None:
        """Write a checkpoint of the last finished step, then delete old ones."""
        self.at.seconds = self.seconds
        state = {"counters": asdict(self.at), "groups": self.groups.state(), "identity": self.identity}
        masters = self.masters.parameters
        tensors = {**masters, **optimizer_tensors(self.optimizer, masters), **self.groups.best_tensors(self.at.step)}
        self.log.sync()
        self.checkpoints.write(self.at.step, tensors, state)
        self.saved_step = self.at.step

    def resume(self) -> None:
        """Continue from the newest intact checkpoint of this stage, if there is one."""
        found = self.checkpoints.newest()
        if found is None:
            self.log.rewind(self.stage, -1)
            return
        require_same_identity(str(found.path), found.state["identity"], self.identity)
        if found.step > self.total:
            raise UserError(
                f"{found.path} is already past the requested {self.total} steps: use another run.dir, request more "
                "steps, or delete that folder"
            )
        names = [name for name in found.names() if not name.startswith(BEST)]
        empty = empty_slots(self.optimizer, self.masters.parameters, names)
        empty |= self.groups.load_state(found.state["groups"], found.step)
        weights = {name: parameter.detach() for name, parameter in self.masters.parameters.items()}
        found.load_into({**weights, **empty})
        for group in self.groups.members:
            group.loaded(found.step)
        self.masters.publish()
        self.at = Counters(**found.state["counters"])
        self.began = time.monotonic() - self.at.seconds
        self.saved_step = self.resumed_from = found.step
        evaluated = self.at.evaluated_step == self.at.step
        dropped = self.log.rewind(self.stage, self.at.step, evaluated=evaluated)
        more = f", dropped {dropped} later log lines" if dropped else ""
        self.log.info(f"{self.stage}: continuing from step {self.at.step} of {self.total} ({found.path.name}{more})")

    def finish(self, stopped: bool) -> FitResult:
        """Restore the best weights, log and return the result."""
        at = self.at
        result = FitResult(
            steps=at.step,
            initial_loss=at.initial_loss,
            best_loss=self.groups.best_loss,
            best_step=self.groups.best_step,
            final_loss=at.last_loss,
            seconds=self.seconds,
            tokens=at.tokens,
            resumed_from=self.resumed_from,
            stopped=stopped,
            early=self.groups.stopped,
            finished=self.ended and not stopped,
        )
        if stopped:
            self.log.info(f"{self.stage}: stopped after step {at.step}; run the same command again to continue")
        if not result.finished:
            return result
        if self.cfg.restore_best:
            for group in self.groups.members:
                group.restore_best()
            self.masters.publish()
        self.log.log("result", stage=self.stage, step=at.step, **asdict(result))
        self.log.sync()
        return result


# Helpers


def trainable(model: nn.Module, stage: str) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; UserError where there is nothing to train."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UserError(f"{stage}: no parameter of the model requires gradients, so there is nothing to train")
    for name, parameter in found.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{stage}: {name} is {parameter.dtype}; trained parameters must be float32")
    return found


def _readable(place: str) -> str:
    """Readable layer name for ``layer_03`` or ``model.layers.3.mlp``."""
    if match := re.fullmatch(r"layer_(\d+)", place):
        return f"layer {int(match.group(1))}"
    if match := re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", place):
        return f"layer {int(match.group(1))} ({place})"
    return place


def _settings(cfg: StageConfig) -> dict[str, Any]:
    """The settings that a run and its continuation must share."""
    return {name: value for name, value in asdict(cfg).items() if name not in _FREE_TO_CHANGE}
