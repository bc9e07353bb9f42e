"""The variants of one loaded model that the stages and the report rows need: with students, with LoRA, with weights.

Every variant is assembled from the same loaded base model: fresh students from the seed, fresh LoRA from the seed, then
the weights of a finished stage. So the results do not depend on the order in which stages and rows are run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from trenchcoat.config import LoraConfig, Recipe, StageConfig, StudentConfig, TransferConfig, UserError
from trenchcoat.config.keep import needs_selection
from trenchcoat.conversion.ready import check_ready
from trenchcoat.conversion.run import LANDMARK_ROWS, OpenRun, Stopped, idle_warning, open_run
from trenchcoat.conversion.selection.run import select_groups, with_groups
from trenchcoat.conversion.teacher_logits import TaughtBatches
from trenchcoat.data.batches import Batches
from trenchcoat.data.esl import EslRanking
from trenchcoat.data.load import FEW_ROWS
from trenchcoat.data.stream import StreamedBatches
from trenchcoat.data.tokens import cache_folder
from trenchcoat.evaluation.results import StageFacts
from trenchcoat.evaluation.rows import window_sinks_student
from trenchcoat.evaluation.selection import SELECTION_FILE, Selection
from trenchcoat.models import hub, identity
from trenchcoat.models.attach import (
    detach_students,
    freeze_for_transfer,
    replace_students,
    set_far,
    set_mode,
    teacher_implementation,
)
from trenchcoat.models.flops import lora_flops_per_token, transfer_flops_per_token
from trenchcoat.models.hub import adapter_state, load_adapter_state, save_adapter
from trenchcoat.models.loading import load_base
from trenchcoat.models.shapes import shapes_of
from trenchcoat.models.stage2 import as_teacher, begin_stage_2, end_stage_2, freeze_for_stage_2
from trenchcoat.runtime import distributed
from trenchcoat.runtime.files import read_json
from trenchcoat.runtime.runfolder import (
    BEFORE,
    CONSTANT_LORA,
    CONSTANT_TRANSFER,
    LORA,
    LORA_ONLY,
    TEACHER_LORA,
    TRANSFER,
    WINDOW_SINKS_LORA,
    constant_student,
    stage_recipe,
)
from trenchcoat.runtime.sharding import compute_device
from trenchcoat.training.logits import own_teacher
from trenchcoat.training.loop import FitOptions, FitResult, fit, trainable
from trenchcoat.training.objectives import Objective, initialise_from_text, stage_2_objective, transfer_objective
from trenchcoat.training.stored import stored_teacher

BASE_WEIGHTS = "base weights"
"""The key of the base model's fingerprint in a stage's record."""


GivenModel = tuple[Any, Any]
"""(model, tokenizer) in memory."""


class ModelVariants:
    """The base model of a run, to which students and LoRA are added and removed; everything is loaded lazily."""

    def __init__(self, run: OpenRun, given: GivenModel | None = None) -> None:
        """``given``: the base model, where it is in memory already; it is changed in place."""
        self.run, self.recipe, self.folder, self.log = run, run.recipe, run.folder, run.log
        self._given = given
        self._trained: set[str] = set()
        self._selected_on: str | None = None
        self._batches: dict[tuple[int, int], Batches] = {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = self._given or load_base(self.recipe.model, self.recipe.parallel)
        attention, device = teacher_implementation(model), compute_device(model)
        self.run.write_environment(model, attention, dtype=cast("torch.dtype", model.dtype), device=device)
        return model, tokenizer

    @property
    def model(self) -> Any:
        """The base model, as ``assemble`` last left it."""
        return self._loaded[0]

    @property
    def implementation(self) -> str:
        """The students' implementation: from the run's ``environment.json``, else from the recipe."""
        path = Path(self.recipe.run.dir) / "environment.json"
        return str((read_json(path) if path.is_file() else {}).get("implementation", self.recipe.student.impl))

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self._loaded[1]

    @cached_property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base weights; UserError when the groups to keep were selected on others."""
        found = identity.fingerprint(self.model)
        if self._selected_on not in (None, found):
            raise UserError(
                f"the groups to keep were selected on other base weights ({self._selected_on}) than these ({found}): "
                f"delete {self.folder.directory / SELECTION_FILE} to select again, or give the model it was made with"
            )
        return found

    def batches(self, batch_size: int, seq_len: int | None = None) -> Batches:
        """The recipe's data in micro-batches of ``batch_size`` rows; the source is read once per size."""
        data = self.recipe.data
        if seq_len is not None and seq_len != data.seq_len:
            data = dataclasses.replace(data, seq_len=seq_len)
        if data.seq_len not in (self.recipe.data.seq_len, self.recipe.row_tokens(self.recipe.lora)):
            data = dataclasses.replace(data, select="none", select_rows=None)  # rows that are only scored
        size = (batch_size, data.seq_len)
        if size not in self._batches:
            rank = None if data.select == "none" else self._ranking(data.seq_len)
            self._batches[size] = self.run.load_batches(self.tokenizer, batch_size=batch_size, data=data, rank=rank)
        return self._batches[size]

    def _ranking(self, seq_len: int) -> EslRanking:
        """Scores of the unmodified model for `data.select`, of training rows of ``seq_len`` tokens."""
        data = self.recipe.data
        folder = cache_folder(data)
        quantize = self.recipe.model.quantize  # a 4-bit base has the fingerprint of its files but different scores
        base = self.base_fingerprint if quantize == "none" else f"{self.base_fingerprint}-{quantize}"
        return EslRanking(self.assemble_teacher, base, seq_len=seq_len, folder=folder, log=self.log)

    def keep_selected(self, selection: Selection) -> None:
        """Name the groups of ``selection`` in the recipe."""
        self.recipe = with_groups(self.recipe, selection.kept)
        self.run = dataclasses.replace(self.run, recipe=self.recipe)
        self._selected_on = selection.base

    # Variants of the model

    def assemble(
        self, *, student: StudentConfig | None = None, lora: bool = False, weights: str | None = None
    ) -> nn.Module:
        """The model in ``student`` mode with fresh students, optional LoRA, and a finished stage's weights."""
        if self.recipe.data.select != "none":
            self.batches(LANDMARK_ROWS)  # ranking the samples removes students and LoRA from the model
        end_stage_2(self.model)
        torch.manual_seed(self.recipe.run.seed)
        students = replace_students(self.model, student if student is not None else self.recipe.student)
        if weights is None and any(one.starts_from_text(one.cfg) for one in students.values()):
            set_mode(self.model, "transfer")
            batch = self.batches(LANDMARK_ROWS).train_batch(0)
            device = compute_device(self.model)
            initialise_from_text(self.model, {name: t.to(device) for name, t in batch.items()})
        if lora:
            torch.manual_seed(self.recipe.run.seed)
            begin_stage_2(self.model, self._lora)
        if weights is not None:
            load_adapter_state(self.model, self.folder.weights(weights))
        set_far(self.model, True)
        set_mode(self.model, "student")
        return self.model

    def assemble_teacher(self, *, lora: bool = False, weights: str | None = None) -> nn.Module:
        """The model with its own attention, and its own weights or (``lora``) what stage 2 trains, with a finished
        stage's weights."""
        if lora and self.recipe.data.select != "none":
            self.batches(LANDMARK_ROWS)  # as in `assemble`
        end_stage_2(self.model)
        detach_students(self.model)
        if lora:
            torch.manual_seed(self.recipe.run.seed)
            begin_stage_2(self.model, self._lora)
        if weights is not None:
            load_adapter_state(self.model, self.folder.weights(weights))
        return self.model

    @property
    def _lora(self) -> LoraConfig:
        if self.recipe.lora is None:
            raise UserError("this recipe has lora=null, so there is no stage 2; remove lora=null to run it")
        return self.recipe.lora

    # Training stages

    @property
    def main_lora_stage(self) -> str:
        """Name of the recipe's stage 2: ``lora``, or ``lora_only`` without a transfer before it."""
        return LORA if self.recipe.transfer is not None else LORA_ONLY

    def train(self, stage: str) -> StageFacts:
        """Run ``stage`` to the end, or read the result of an earlier call. Raises ``Stopped`` after Ctrl-C."""
        kept = distributed.from_main(lambda: self.folder.result(stage))
        if kept is not None:
            return StageFacts(**kept)
        if stage in BEFORE:
            self.require_base(BEFORE[stage])
        objective, cfg = self._prepare(stage)
        idle = idle_warning(cfg)
        if idle is not None:
            self.log.warning(idle)
        batches = self.batches(cfg.batch_size, self.recipe.row_tokens(cfg))
        self._log_text(batches)
        identity = {BASE_WEIGHTS: self.base_fingerprint, "text": batches.fingerprint}
        distributed.from_main(lambda: self.folder.begin(stage, self.recipe, identity))
        flops = step_flops(self.model.config, stage_recipe(self.recipe, stage), cfg)
        options = FitOptions(self.recipe.parallel.async_save, flops, self.base_fingerprint)
        source = self._taught(batches, cfg)
        result = fit(self.model, source, objective, cfg, self.log, stage=stage, options=options)
        if result.stopped:
            raise Stopped
        facts = stage_facts(stage, result)
        self._trained.add(stage)
        learned = adapter_state(self.model)
        distributed.from_main(lambda: self.folder.finish(stage, learned, dataclasses.asdict(facts)))
        return facts

    def require_base(self, stage: str) -> None:
        """Raise ``UserError`` when a stage was trained on other base weights than these."""
        distributed.from_main(partial(self.folder.require_identity, stage, BASE_WEIGHTS, self.base_fingerprint))

    def _taught(self, batches: Batches, cfg: StageConfig) -> Batches | TaughtBatches:
        """The batches of a stage; with ``lora.teacher_logits``, the teacher's logits are with them, and on disk."""
        if not isinstance(cfg, LoraConfig) or cfg.teacher_logits is None:
            return batches
        quantize = self.recipe.model.quantize
        base = self.base_fingerprint if quantize == "none" else f"{self.base_fingerprint}-{quantize}"
        found = TaughtBatches(batches, Path(cfg.teacher_logits), self.model, base, self.log)
        self.run.resources.callback(found.close)
        found.fill(self.model, cfg)
        return found

    def _log_text(self, batches: Batches) -> None:
        """Log the amount of text and what was skipped."""
        counts = batches.counts
        left_out = [
            f"{number} {name.split('/')[-1]}" for name, number in counts.items() if "skipped/" in name and number
        ]
        masked = counts.get("train/rows_masked", 0)
        left_out += [f"{masked} rows without a label that counts"] if masked else []
        if isinstance(batches, StreamedBatches):
            training = f"{batches.name} as a stream in {batches.shards} shards"
        else:
            training = f"{counts['train/rows']} training rows"
        if "train/rows_selected" in counts:
            training += f" of {counts['train/rows_selected']} selected"
        text = f"text: {training}, {counts['validation/rows']} validation rows"
        text += f"; left out: {', '.join(left_out)}" if left_out else ""
        if FEW_ROWS in counts:
            asked = self.recipe.data.validation_rows
            text += f"; of {counts[FEW_ROWS]} rows a tenth is held out, not data.validation_rows={asked}"
        self.log.info(text)

    def stage_config(self, stage: str) -> StageConfig:
        """The settings that a stage trains with."""
        if stage not in BEFORE.values():
            return stage_recipe(self.recipe, stage).lora or self._lora
        if self.recipe.transfer is None:
            raise UserError("this recipe has transfer=null, so there is no stage 1; run `finetune`, or `linearize`")
        return self.recipe.transfer

    def rehearse(self, stage: str) -> int:
        """Assemble and freeze the model as a stage will, with new weights; the number of parameters that it trains.

        Raises what the stage would raise when it begins.
        """
        self._prepare(stage, fresh=True)
        found = sum(parameter.numel() for parameter in trainable(self.model, stage).values())
        self.assemble_teacher()
        return found

    def _prepare(self, stage: str, *, fresh: bool = False) -> tuple[Objective, StageConfig]:
        """Assemble and freeze the model for a stage; returns its objective and settings.

        ``fresh``: with new weights where stage 2 continues from those of a transfer.
        """
        cfg = self.stage_config(stage)
        student = constant_student(self.recipe) if stage in (CONSTANT_TRANSFER, CONSTANT_LORA) else None
        if isinstance(cfg, TransferConfig):
            self.assemble(student=student)
            set_mode(self.model, "transfer")
            freeze_for_transfer(self.model)
            return transfer_objective(cfg), cfg
        if stage == WINDOW_SINKS_LORA:
            self.assemble(student=window_sinks_student(self.recipe), lora=True)
        elif stage == TEACHER_LORA:
            self.assemble_teacher(lora=True)
        elif stage == LORA_ONLY:
            self.assemble(lora=True)
        else:
            self.assemble(student=student, weights=None if fresh else BEFORE[stage])
            torch.manual_seed(self.recipe.run.seed)
            begin_stage_2(self.model, self._lora)
        assert isinstance(cfg, LoraConfig)
        freeze_for_stage_2(self.model, cfg)
        teacher = own_teacher(as_teacher) if cfg.teacher_logits is None else stored_teacher
        return stage_2_objective(cfg, teacher), cfg

    @property
    def adapter(self) -> Path:
        """The run's adapter folder."""
        return self.folder.directory / "adapter"

    def _exported(self, lora: bool) -> bool:
        """Whether the adapter folder already exists, with or without LoRA as given."""
        meta = self.adapter / hub.ADAPTER_META
        return meta.is_file() and (hub.read_meta(self.adapter).get("lora") is not None) == lora

    def export(self, stage: str) -> None:
        """Write the adapter folder from a finished stage, unless it already exists."""
        lora = stage != TRANSFER
        if stage not in self._trained and distributed.from_main(lambda: self._exported(lora)):
            return
        self.assemble(lora=lora, weights=stage)
        recipe, known = self.recipe, self.base_fingerprint
        distributed.from_main(
            lambda: save_adapter(
                self.model,
                self.adapter,
                base=recipe.model,
                student=recipe.student,
                lora=recipe.lora,
                base_fingerprint=known,
            )
        )


@contextmanager
def open_variants(recipe: Recipe, stages: list[str], given: GivenModel | None = None) -> Iterator[ModelVariants]:
    """Open a run and return its model variants; see :func:`open_run`. ``given``: see :class:`ModelVariants`.

    Where ``student.keep`` says how much to keep, the groups are selected first (or read from the run's folder), and the
    recipe of the variants names them.
    """
    if not needs_selection(recipe.student):
        with open_run(recipe, stages) as run:
            yield ModelVariants(run, given)
        return
    with open_run(recipe, []) as run:
        variants = ModelVariants(run, given)
        check_ready(variants, stages)
        variants.keep_selected(select_groups(variants))
        run.folder.refuse_other_recipe(variants.recipe, stages)
        yield variants


def step_flops(config: Any, recipe: Recipe, cfg: StageConfig) -> float | None:
    """FLOPs per token of a training step; None if the model's ``config`` lacks its sizes."""
    try:
        shapes = shapes_of(config)
    except UserError:
        return None
    if isinstance(cfg, LoraConfig):
        return lora_flops_per_token(shapes, recipe.student, cfg, recipe.row_tokens(cfg)).total
    xent = isinstance(cfg, TransferConfig) and cfg.xent_weight > 0
    return transfer_flops_per_token(shapes, recipe.student, recipe.data.seq_len, xent=xent).total


def stage_facts(stage: str, result: FitResult) -> StageFacts:
    """The figures of a finished stage."""
    return StageFacts(stage, result.steps, result.tokens, result.seconds, result.best_loss)
