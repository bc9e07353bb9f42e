"""The record of finished stages in a run's folder: a rerun skips them, and another recipe is refused.

stages/<name>/settings.json        the settings the stage depends on, written when it begins
stages/<name>/weights.safetensors  what it learned
stages/<name>/result.json          its figures; written last, so its presence means finished
evaluation/<name>.json             scores, kept until the settings or the weights behind them change

Each carries a checksum; ``result.json`` and ``evaluation/<name>.key`` also hold that of the file that they belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trenchcoat.config import Recipe, StudentConfig, UserError
from trenchcoat.config.paths import same_place
from trenchcoat.config.settings import PATHS
from trenchcoat.runtime.files import (
    CONTENT,
    HOLDER_FILE,
    LOCK_FILE,
    CorruptFileError,
    read_tensors,
    remove,
    save_tensors,
    sha256,
)
from trenchcoat.runtime.sealed import read_sealed, write_sealed

TRANSFER, LORA, LORA_ONLY, WINDOW_SINKS_LORA = "transfer", "lora", "lora_only", "window_sinks_lora"
SELECT = "select"
TEACHER_LORA = "teacher_lora"
CONSTANT_TRANSFER, CONSTANT_LORA = "constant_transfer", "constant_lora"
"""Both stages of a second conversion of the model, without kept groups."""
BEFORE = {LORA: TRANSFER, CONSTANT_LORA: CONSTANT_TRANSFER}
"""Stage 2 -> the transfer that it continues."""

SETTINGS, WEIGHTS, RESULT = "settings.json", "weights.safetensors", "result.json"
"""The files of a stage."""

LEARNED = "weights"
"""Key of the weights' checksum among a stage's figures."""

_START = (LOCK_FILE, HOLDER_FILE, "metrics.jsonl", "environment.json")
"""The files that a run's folder holds before a stage begins."""

_DEPENDS: dict[str, tuple[str, ...]] = {
    SELECT: ("model", "student.window", "student.keep_softmax", "data", "select", "eval.sinks", "run"),
    TRANSFER: ("model", "student", "data", "transfer", "blocks.epochs", "run"),
    LORA: ("model", "student", "data", "transfer", "blocks.epochs", "lora", "run"),
    LORA_ONLY: ("model", "student", "data", "lora", "run"),
    WINDOW_SINKS_LORA: (
        "model", "student.window", "student.keep", "student.keep_softmax", "data", "lora", "run", "eval.sinks",
    ),
    TEACHER_LORA: ("model", "data", "lora", "run"),
    CONSTANT_TRANSFER: ("model", "student", "data", "transfer", "blocks.epochs", "run"),
    CONSTANT_LORA: ("model", "student", "data", "transfer", "blocks.epochs", "lora", "run"),
}  # fmt: skip
"""Sections and fields of the recipe that decide a stage's outcome."""

_FREE = {
    "model.device", "data.cache_dir", "run.dir", "run.threads", "run.progress",
    "run.trackers", "run.project",
    "transfer.save_every", "transfer.keep_checkpoints", "lora.save_every", "lora.keep_checkpoints",
    "lora.gradient_checkpointing",
}  # fmt: skip
"""Fields that may change when a run is resumed."""


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dataclasses or mappings as {path: plain value}; tuples become lists, as JSON returns them."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        parts = (flatten(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
        return {name: item for part in parts for name, item in part.items()}
    return {path: list(value) if isinstance(value, tuple) else value}


def constant_student(recipe: Recipe) -> StudentConfig:
    """The recipe's student with nothing kept of the softmax attention."""
    return replace(recipe.student, keep=(), keep_softmax=(), kept_log_scale=None)


def stage_recipe(recipe: Recipe, stage: str) -> Recipe:
    """The recipe under which ``stage`` trains: without a transfer before it, a comparison's stage 2 trains the feature
    maps too; a teacher's has no divergence from itself to minimize, so it minimizes the next-token loss; a conversion
    without kept groups keeps none."""
    if stage in (CONSTANT_TRANSFER, CONSTANT_LORA):
        recipe = replace(recipe, student=constant_student(recipe))
    lora = recipe.lora
    if lora is None:
        return recipe
    if stage == LORA_ONLY and recipe.transfer is not None:
        lora = replace(lora, train_feature_maps=True)
    if stage == TEACHER_LORA:
        lora = replace(lora, loss="ce", teacher_logits=None)
    return replace(recipe, lora=lora)


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """{path: value} of every setting that decides the outcome of ``stage``."""
    chosen = _DEPENDS[stage]
    free = _free(stage)
    recipe = stage_recipe(recipe, stage)
    return {
        path: value
        for path, value in flatten(recipe).items()
        if path not in free and any(path == part or path.startswith(f"{part}.") for part in chosen)
    }


def _free(stage: str) -> set[str]:
    """Fields that may change when ``stage`` is resumed; stage 1 does not read how kept heads are scaled."""
    return _FREE | ({"student.kept_log_scale"} if stage in (TRANSFER, CONSTANT_TRANSFER) else set())


def is_changed(name: str, before: Any, now: Any) -> bool:
    """Whether the setting ``name`` has another value; a path may be recorded as relative and given as absolute."""
    return before != now and not (name in PATHS and same_place(before, now))


class RunFolder:
    """The started and finished stages, and the saved scores, of one run."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    def stage_dir(self, stage: str) -> Path:
        """Folder of a stage's record."""
        return self.directory / "stages" / stage

    def refuse_other_recipe(self, recipe: Recipe, stages: list[str]) -> None:
        """Raise ``UserError`` when one of ``stages`` was started here with other settings."""
        for stage in stages:
            self._compare(stage, stage_settings(recipe, stage))

    def begin(self, stage: str, recipe: Recipe, identity: Mapping[str, Any]) -> None:
        """Record the settings of a starting stage, with the ``identity`` of what the recipe only refers to.

        Raises ``UserError`` when it was started here with other settings.
        """
        settings = {**stage_settings(recipe, stage), **identity}
        self._compare(stage, settings)
        write_sealed(self.stage_dir(stage) / SETTINGS, {**self.settings(stage), **settings})

    def settings(self, stage: str) -> dict[str, Any]:
        """What :meth:`begin` recorded; empty for a stage that was not started. ``CorruptFileError`` for a damaged
        file."""
        path = self.stage_dir(stage) / SETTINGS
        return read_sealed(path, self._again(stage)) if path.is_file() else {}

    def _again(self, stage: str) -> str:
        return f"restore it, or delete {self.stage_dir(stage)} to run the stage again"

    def _compare(self, stage: str, now: Mapping[str, Any]) -> None:
        before = {name: value for name, value in self.settings(stage).items() if name not in _free(stage)}
        changed = [name for name in now if name in before and is_changed(name, before[name], now[name])]
        changed += [name for name in before if name not in now and name.split(".")[0] in {n.split(".")[0] for n in now}]
        if stage == TRANSFER and self.result(stage) is not None:  # LoRA may continue on the same weights in 4 bits
            changed = [name for name in changed if name != "model.quantize"]
        if changed:
            shown = "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{self.directory} holds stage {stage!r} of another recipe: {shown}{more}. "
                "Give this run another folder (run.dir=...), delete that folder, or use its settings"
            )

    def require_identity(self, stage: str, name: str, value: str) -> None:
        """Raise ``UserError`` when ``stage`` was started here with another ``name`` (of ``identity`` in `begin`)."""
        before = self.settings(stage).get(name)
        if before not in (None, value):
            raise UserError(
                f"stage {stage!r} in {self.directory} was made with other {name} ({before}) than these ({value}): give "
                "the model that it was made with, or run it again in another folder (run.dir=...)"
            )

    def begun(self, stage: str) -> bool:
        """Whether the stage was started here."""
        return (self.stage_dir(stage) / SETTINGS).is_file()

    def finish(self, stage: str, tensors: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
        """Save what a stage learned, and mark it finished."""
        save_tensors(self.stage_dir(stage) / WEIGHTS, tensors)
        self.mark_finished(stage, result)

    def mark_finished(self, stage: str, result: Mapping[str, Any]) -> None:
        """Record the figures of a stage whose weights are saved, and which weights they are."""
        learned = read_tensors(self.stage_dir(stage) / WEIGHTS)[1].get(CONTENT)
        write_sealed(self.stage_dir(stage) / RESULT, {**result, LEARNED: learned})

    def _record(self, stage: str) -> dict[str, Any] | None:
        path = self.stage_dir(stage) / RESULT
        return read_sealed(path, self._again(stage)) if path.is_file() else None

    def result(self, stage: str) -> dict[str, Any] | None:
        """The results of a finished stage, else None; ``CorruptFileError`` for a damaged file."""
        record = self._record(stage)
        return None if record is None else {name: value for name, value in record.items() if name != LEARNED}

    def learned(self, stage: str) -> str | None:
        """The checksum of what a finished stage learned, else None."""
        record = self._record(stage)
        return None if record is None else str(record[LEARNED])

    def weights(self, stage: str) -> dict[str, Tensor]:
        """What a finished stage learned; ``CorruptFileError`` for weights that are damaged or not that stage's."""
        path = self.stage_dir(stage) / WEIGHTS
        try:
            tensors, record = read_tensors(path)
        except CorruptFileError as error:
            raise CorruptFileError(f"{error}; {self._again(stage)}") from error
        if record.get(CONTENT) != self.learned(stage):
            raise CorruptFileError(f"{path} does not hold what stage {stage!r} learned; {self._again(stage)}")
        return tensors

    def kept(self, name: str, key: Mapping[str, Any]) -> Path | None:
        """The evaluation file ``name`` if it was written with the same ``key``, else None.

        Raises ``CorruptFileError`` when it is not the file that was written then.
        """
        path = self.evaluation_path(name)
        stamp = path.with_suffix(".key")
        if not path.is_file() or not stamp.is_file():
            return None
        fix = f"delete {path} to have it measured again"
        found = read_sealed(stamp, fix)
        if found["key"] != _digest(key):
            return None
        if found["content"] != sha256(path):
            raise CorruptFileError(f"{path} is damaged: its checksum is not the one in {stamp.name}; {fix}")
        return path

    def keep(self, name: str, key: Mapping[str, Any]) -> None:
        """Record the settings behind the evaluation file ``name``, which is already written."""
        path = self.evaluation_path(name)
        write_sealed(path.with_suffix(".key"), {"key": _digest(key), "content": sha256(path)})

    def evaluation_path(self, name: str) -> Path:
        """Path of the scores ``name``; creates the folder."""
        folder = self.directory / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.json"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def first_missing(directory: Path) -> Path | None:
    """The first folder on the way to ``directory`` that would have to be made; None where all exist."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    return missing[-1] if missing else None


def remove_start(directory: Path, created: Path | None, more: Sequence[str] = ()) -> None:
    """Remove what a failed start left in ``directory``, and the folders from ``created`` down to it.

    Nothing is removed where ``created`` is None, or where the folder holds anything that is worth keeping. ``more``:
    names of further files and folders that are not.
    """
    start = {*_START, *more}
    if created is None or not directory.is_dir() or not {path.name for path in directory.iterdir()} <= start:
        return
    for name in start:
        remove(directory / name)
    for folder in (directory, *directory.parents):
        with suppress(OSError):  # another command has begun to use it
            folder.rmdir()
        if folder == created:
            return
