"""The one training loop, for every stage: ``fit(model, batches, objective, cfg, run, stage=...)``.

It steps AdamW over the parameters that require gradients, the schedule, clipping, evaluation, best-checkpoint keeping,
early stopping, saving and resuming. A run killed at any moment and started again ends with the numbers of an
uninterrupted one: weights, optimizer, schedule, data position and random state are restored, and the log is rewound.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trenchcoat import checkpoint
from trenchcoat.checkpoint import Checkpoint, CorruptFileError
from trenchcoat.config import StageConfig, UserError
from trenchcoat.gradients import NonFiniteGradient, average_and_clip, clip_groups
from trenchcoat.interrupts import Interrupted, StopSignal, stop_on_signals
from trenchcoat.objectives import Batch, Metrics, Objective, first_nonfinite
from trenchcoat.runlog import RunLog, Tracker
from trenchcoat.schedules import Schedule
from trenchcoat.students import StudentAttention
from trenchcoat.trainstate import (
    Counters,
    load_optimizer,
    optimizer_tensors,
    random_state,
    require_same_identity,
    set_random_state,
)

_FREE_TO_CHANGE = (
    "epochs",
    "max_steps",
    "save_every",
    "keep_checkpoints",
    "early_stopping",
    "restore_best",
    "gradient_checkpointing",
)
"""Settings that may differ between a run and its continuation."""


class NonFiniteLoss(UserError):
    """A loss or gradient became NaN or infinite; ``stage``, ``step`` (the one being made) and ``where`` say where."""

    def __init__(self, stage: str, step: int, where: str, what: str) -> None:
        self.stage, self.step, self.where = stage, step, where
        super().__init__(
            f"{stage}: the {what} is not finite at step {step}, first in {where}. Checkpoints made before it are "
            f"intact; lower {stage}.lr, set {stage}.clip, or use model.dtype=float32 or bfloat16"
        )


class Batches(Protocol):
    """What ``fit`` asks of the data: random access by micro-batch index, and a validation set."""

    def __len__(self) -> int:
        """Micro-batches an epoch."""

    def train_batch(self, index: int) -> Batch:
        """Micro-batch ``index``, counted over epochs; always the same for the same index."""

    def validation(self, limit: int | None = None) -> Iterable[Batch]:
        """The first ``limit`` validation micro-batches (None: all)."""


@dataclass(frozen=True)
class FitResult:
    """How a stage ended. Losses are evaluation losses; ``initial_loss`` is that of step 0."""

    steps: int
    initial_loss: float
    best_loss: float
    best_step: int
    final_loss: float
    seconds: float
    tokens: int
    resumed_from: int | None
    stopped: bool
    """Ctrl-C (or SIGTERM) ended it: a checkpoint was saved and the caller must stop too."""
    early: bool
    """Early stopping ended it."""


def fit(
    model: nn.Module, batches: Batches, objective: Objective, cfg: StageConfig, run: RunLog, *, stage: str
) -> FitResult:
    """Train the parameters of ``model`` that require gradients (float32) and leave the best of them in it.

    ``stage`` names the checkpoint folder and the log lines. A finished stage is loaded, not trained again. Raises
    ``UserError`` for nothing to train or a checkpoint of other settings, ``NonFiniteLoss`` naming layer and step,
    ``SaveError`` for a full disk. After Ctrl-C it saves and returns with ``stopped`` set.
    """
    loop = _Loop(model, batches, objective, cfg, run, stage)
    loop.resume()
    stopped = False
    with stop_on_signals() as stop, run.progress(stage, loop.total, loop.at.step) as display:
        try:
            loop.run(stop, display)
        except Interrupted:
            stopped = True
            loop.abandon_step()
    return loop.finish(stopped)


class _Loop:
    def __init__(
        self, model: nn.Module, batches: Batches, objective: Objective, cfg: StageConfig, log: RunLog, stage: str
    ) -> None:
        self.model, self.batches, self.objective = model, batches, objective
        self.cfg, self.log, self.stage = cfg, log, stage
        self.trainable = _trainable(model, stage)
        self.device = next(iter(self.trainable.values())).device
        self.micro_batches, self.total = _length(cfg, len(batches))
        self.groups = clip_groups(model, self.trainable, cfg.clip_scope)
        self.optimizer = torch.optim.AdamW(
            list(self.trainable.values()), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
        )
        self.schedule = Schedule(cfg, self.total)
        self.root = log.checkpoints(stage)
        self.identity = _identity(model, self.trainable, batches, cfg)
        self.at = Counters()
        self.saved_step = -1
        self.saved: dict[int, int] = {}
        """Step of every sound checkpoint on disk -> the best step it refers to."""
        self.resumed_from: int | None = None
        self.seconds_before, self.began = 0.0, time.monotonic()
        self.random = random_state()

    # The way through

    def run(self, stop: StopSignal, display: Tracker) -> None:
        """Evaluate, save and step until done."""
        at, cfg = self.at, self.cfg
        while True:
            ended = at.step >= self.total or self.early
            if at.evaluated_step != at.step and (at.step % cfg.eval_every == 0 or ended):
                self.evaluate(stop)
                ended = ended or self.early
            wanted = ended or at.best_step == at.step or at.step % cfg.save_every == 0
            if wanted and self.saved_step != at.step:
                self.save()
            if ended:
                return
            self.train_step(stop, display)

    @property
    def early(self) -> bool:
        """Whether early stopping has had enough."""
        return self.cfg.early_stopping is not None and self.at.bad >= self.cfg.early_stopping

    @property
    def seconds(self) -> float:
        """Time spent in this stage, earlier runs of it included."""
        return self.seconds_before + time.monotonic() - self.began

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def train_step(self, stop: StopSignal, display: Tracker) -> None:
        """One optimizer step: accumulate, check, clip, update, log."""
        at = self.at
        first = at.step * self.cfg.accumulation
        indices = range(first, min(first + self.cfg.accumulation, self.micro_batches))
        collected: list[Metrics] = []
        for index in indices:
            stop.check()
            batch = self._to_device(self.batches.train_batch(index))
            with torch.enable_grad():
                collected.append(self.objective(self.model, batch))
            self._require_finite(collected[-1], at.step + 1, batch)
        rate = self.schedule.lr(at.step)
        try:
            norm = average_and_clip(self.groups, len(indices), self.cfg.clip)
        except NonFiniteGradient as error:
            raise NonFiniteLoss(self.stage, at.step + 1, error.group, "gradient norm") from error
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        self.random = random_state()
        numbers = _mean(collected)
        at.tokens += round(sum(metrics.get("tokens", 0.0) for metrics in collected))
        line = {**numbers, "lr": rate, "grad_norm": norm, "tokens": at.tokens, "seconds": round(self.seconds, 3)}
        self.log.log("train", stage=self.stage, step=at.step, **line)
        display.update(at.step, loss=numbers["loss"], eval=at.last_loss, lr=rate)

    def _require_finite(self, metrics: Metrics, step: int, batch: Batch) -> None:
        if all(math.isfinite(value) for value in metrics.values()):
            return
        layers = sorted(name for name in metrics if "/layer_" in name and not math.isfinite(metrics[name]))
        if layers:
            where = _readable(layers[0].split("/", 1)[1])
        else:
            where = _readable(first_nonfinite(self.model, self.objective, batch) or "the loss itself")
        raise NonFiniteLoss(self.stage, step, where, "loss")

    def evaluate(self, stop: StopSignal) -> None:
        """Mean loss over the validation batches (weighted by their tokens); feeds schedule, best and early stopping."""
        began, at = time.monotonic(), self.at
        collected: list[Metrics] = []
        with torch.no_grad():
            for batch in self.batches.validation(self.cfg.eval_batches):
                stop.check()
                moved = self._to_device(batch)
                collected.append(self.objective(self.model, moved))
                self._require_finite(collected[-1], at.step, moved)
        if not collected:
            raise UserError(f"{self.stage}: there are no validation rows; set data.validation_rows above 0")
        numbers = _mean(collected, weights=[metrics.get("tokens", 1.0) for metrics in collected])
        loss = numbers["loss"]
        at.last_loss, at.evaluated_step = loss, at.step
        self.random = random_state()
        self.schedule.observe(loss)
        if at.step == 0:
            at.initial_loss = loss
        if loss < at.best_loss:
            at.best_loss, at.best_step, at.bad = loss, at.step, 0
        else:
            at.bad += 1
        self.saved_step = -1
        spent = round(time.monotonic() - began, 3)
        self.log.log("eval", stage=self.stage, step=at.step, **numbers, tokens=at.tokens, seconds=spent)

    def abandon_step(self) -> None:
        """After an interruption: forget the unfinished step and save the last finished one."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.saved_step != self.at.step:
            self.save()

    # Saving and resuming

    def save(self) -> None:
        """Write a checkpoint of the last finished step, then delete those no longer needed."""
        step = self.at.step
        self.at.seconds = self.seconds
        state = {
            "stage": self.stage,
            "counters": self.at.to_json(),
            "schedule": self.schedule.state(),
            "identity": self.identity,
        }
        groups: dict[str, Mapping[str, Tensor]] = {
            "weights": self.trainable,
            "optimizer": optimizer_tensors(self.optimizer, self.trainable),
            "random": self.random,
        }
        self.log.sync()
        checkpoint.write_checkpoint(self.root, step, groups, state)
        self.saved_step = step
        self.saved[step] = self.at.best_step
        newest = sorted(self.saved)[-max(self.cfg.keep_checkpoints, 1) :]
        keep = {*newest, *(self.saved[kept] for kept in newest)}
        checkpoint.prune_checkpoints(self.root, keep)
        self.saved = {kept: best for kept, best in self.saved.items() if kept in keep}

    def resume(self) -> None:
        """Continue from the newest sound checkpoint of this stage, if there is one."""
        found = checkpoint.newest_checkpoint(self.root, self.log.warning)
        if found is None:
            self.log.rewind(self.stage, -1)
            return
        require_same_identity(str(found.path), found.state["identity"], self.identity)
        if found.step > self.total:
            raise UserError(
                f"{found.path} is already past the {self.total} steps asked for: use another run.dir, ask for more "
                "steps, or delete that folder"
            )
        self._load_weights(found)
        load_optimizer(self.optimizer, self.trainable, found.tensors("optimizer"))
        self.schedule.load_state(found.state["schedule"])
        self.at = Counters.from_json(found.state["counters"])
        self.seconds_before, self.saved_step, self.resumed_from = self.at.seconds, found.step, found.step
        self._know_saved(found)
        evaluated = self.at.evaluated_step == self.at.step
        dropped = self.log.rewind(self.stage, self.at.step, evaluated=evaluated)
        self.random = found.tensors("random")
        set_random_state(self.random)
        more = f", {dropped} log lines after it dropped" if dropped else ""
        self.log.info(f"{self.stage}: continuing from step {self.at.step} of {self.total} ({found.path.name}{more})")

    def _know_saved(self, found: Checkpoint) -> None:
        """List the sound checkpoints up to the one in use; forget a best one that is damaged."""
        at = self.at
        for path in checkpoint.checkpoint_folders(self.root):
            try:
                older = found if path == found.path else checkpoint.read_checkpoint(path)
            except CorruptFileError:
                continue
            if older.step <= found.step:
                self.saved[older.step] = older.state["counters"]["best_step"]
        if at.best_step >= 0 and at.best_step not in self.saved:
            self.log.warning(
                f"{self.stage}: the best checkpoint (step {at.best_step}) is missing or damaged; the best is counted "
                f"anew from step {at.step}"
            )
            evaluated = at.evaluated_step == at.step
            at.best_step, at.best_loss = (at.step, at.last_loss) if evaluated else (-1, math.inf)

    def _load_weights(self, source: Checkpoint) -> None:
        weights = source.tensors("weights")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(weights[name])

    def finish(self, stopped: bool) -> FitResult:
        """Restore the best weights, log and return the result."""
        at = self.at
        result = FitResult(
            steps=at.step,
            initial_loss=at.initial_loss,
            best_loss=at.best_loss,
            best_step=at.best_step,
            final_loss=at.last_loss,
            seconds=self.seconds,
            tokens=at.tokens,
            resumed_from=self.resumed_from,
            stopped=stopped,
            early=self.early,
        )
        if stopped:
            self.log.info(f"{self.stage}: stopped after step {at.step}; run the same command again to go on")
            return result
        if self.cfg.restore_best and at.best_step not in (-1, at.step):
            try:
                self._load_weights(checkpoint.read_checkpoint(checkpoint.checkpoint_path(self.root, at.best_step)))
            except CorruptFileError as error:
                self.log.warning(f"{self.stage}: {error}; the weights of the last step are kept instead of the best")
        self.log.log("result", stage=self.stage, step=at.step, **asdict(result))
        self.log.sync()
        return result


# Parts that need no loop


def _trainable(model: nn.Module, stage: str) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UserError(f"{stage}: no parameter of the model requires gradients, so there is nothing to train")
    for name, parameter in found.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{stage}: {name} is {parameter.dtype}; trained parameters must be float32")
    return found


def _length(cfg: StageConfig, epoch: int) -> tuple[int, int]:
    """(micro-batches, optimizer steps) of the whole stage; the last step of an epoch count may be a short one."""
    if cfg.max_steps is not None:
        return cfg.max_steps * cfg.accumulation, cfg.max_steps
    micro_batches = math.ceil(cfg.epochs * epoch)
    return micro_batches, math.ceil(micro_batches / cfg.accumulation)


def _mean(collected: list[Metrics], weights: list[float] | None = None) -> Metrics:
    """Weighted mean of every number; ``tokens`` is left out (it is a count)."""
    shares = weights if weights is not None and sum(weights) > 0 else [1.0] * len(collected)
    total = sum(shares)
    names = [name for name in collected[0] if name != "tokens"]
    return {
        name: sum(share * metrics[name] for share, metrics in zip(shares, collected, strict=True)) / total
        for name in names
    }


def _readable(place: str) -> str:
    """``layer_03`` and ``model.layers.3.mlp`` as words that name the layer."""
    if match := re.fullmatch(r"layer_(\d+)", place):
        return f"layer {int(match.group(1))}"
    if match := re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", place):
        return f"layer {int(match.group(1))} ({place})"
    return place


def _identity(
    model: nn.Module, trainable: dict[str, nn.Parameter], batches: Batches, cfg: StageConfig
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
        "settings": {name: value for name, value in asdict(cfg).items() if name not in _FREE_TO_CHANGE},
        "data": getattr(batches, "fingerprint", None),
        "micro_batches_an_epoch": len(batches),
        "trained_parameters": shapes.hexdigest()[:16],
        "frozen_students": frozen.hexdigest()[:16],
        "base_model": checkpoint.fingerprint(model) if hasattr(model, "config") else None,
    }
