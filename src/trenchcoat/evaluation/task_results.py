"""Results of tasks and probes: the file ``tasks.json``.

A task keeps the result of every row, so that two models on the same rows are compared row by row: the error of a
difference is that of the paired differences, smaller than the two models' errors suggest.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from trenchcoat.config import UserError
from trenchcoat.evaluation.results import json_ready, number_or_nan
from trenchcoat.evaluation.statistics import Estimate, mean_estimate
from trenchcoat.runtime.files import read_json
from trenchcoat.runtime.sealed import opened, write_sealed

TASKS_FILE = "tasks.json"
TASKS_FORMAT = 2
STUDENT, TEACHER, FAR_OFF = "student", "teacher", "far_off"
MODEL_LABELS = {STUDENT: "model", FAR_OFF: "far part off", TEACHER: "teacher"}
"""The models of a record, in order."""


@dataclass
class ModelScore:
    """Scores of one model on one task."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> value of every row, in the task's order; empty for groups and for metrics that are not means."""
    too_long: int = 0
    """Rows counted as wrong because their prompts were too long (``mmlu_letters`` with a ``max_length``)."""


@dataclass
class TaskRecord:
    """One task (or group of tasks), and the models scored on it."""

    name: str
    alias: str
    count: int
    """Rows scored."""
    rows_id: str = ""
    """Identity of the rows, their prompts included: equal if results can be compared row by row."""
    members: list[str] = field(default_factory=list)
    """Tasks of a group; empty for a task."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Few-shot examples, limit, seeds, version of the task, source of its rows."""
    scores: dict[str, ModelScore] = field(default_factory=dict)
    """``student`` and ``teacher``."""
    past_2w: tuple[int, int] | None = None
    """(scored tokens with more than 2W tokens before them, all scored tokens); None: unknown."""

    @property
    def identity(self) -> Any:
        """Equal for records of the same rows."""
        return self.rows_id, self.members, self.settings

    def join(self, other: TaskRecord) -> None:
        """Add the scores of other models on the same rows."""
        self.scores |= other.scores
        self.past_2w = self.past_2w or other.past_2w

    def metrics(self) -> list[str]:
        """All metrics of any model."""
        return list(dict.fromkeys(metric for score in self.scores.values() for metric in score.metrics))

    def metric(self, model: str, metric: str) -> Estimate | None:
        """A metric of one model; None if it was not scored."""
        return self.scores[model].metrics.get(metric) if model in self.scores else None


@dataclass
class ProbeRecord:
    """One long-context probe: shares of right tokens by length and depth."""

    name: str
    lengths: list[int]
    depths: list[float]
    """Where in the text the answer is (0: at the start); one entry for a probe without a depth."""
    trained: int
    """Length of the training rows in tokens."""
    chance: float | None = None
    """Accuracy of guessing, if known."""
    settings: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    """Model (``student``, ``far_off``, ``teacher``) -> [length][depth][row]."""
    controls: dict[str, list[list[float]]] = field(default_factory=dict)
    """Model -> [length][row] of the same ending without the text it refers to; empty if chance is known."""

    @property
    def identity(self) -> Any:
        """Equal for records of the same rows."""
        return self.lengths, self.depths, self.trained, self.settings

    def join(self, other: ProbeRecord) -> None:
        """Add the shares of other models on the same rows."""
        self.shares |= other.shares
        self.controls |= other.controls

    def mean(self, model: str, length: int, depth: int) -> float:
        """Mean share of a cell."""
        return statistics.fmean(self.shares[model][length][depth])

    def means(self, model: str) -> list[float]:
        """Mean share at each length, over all depths; empty for a model that was not scored."""
        cells_by_length = self.shares.get(model, [])
        return [statistics.fmean(row for cell in cells for row in cell) for cells in cells_by_length]


@dataclass
class TaskResults:
    """Everything in ``tasks.json``."""

    model: str
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    probes: dict[str, ProbeRecord] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    """One entry per model and task: tasks, seconds, rows, tokens given and tokens read."""
    environment: dict[str, Any] = field(default_factory=dict)

    def add(self, other: TaskResults) -> None:
        """Merge ``other``: scores join a record of the same rows and settings, or replace one of others."""
        for mine, theirs in ((self.tasks, other.tasks), (self.probes, other.probes)):
            for name, record in cast("Mapping[str, Any]", theirs).items():
                known = cast("dict[str, Any]", mine).setdefault(name, record)
                if known.identity == record.identity:
                    known.join(record)
                else:
                    mine[name] = record
        self.made += other.made
        self.environment = other.environment

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_sealed(path, json_ready({"format": TASKS_FORMAT, **asdict(self), "differences": self._differences()}))

    def _differences(self) -> dict[str, Any]:
        """Student minus teacher by task and metric, for readers of the file; ``load`` ignores it."""
        found: dict[str, Any] = {}
        for name, record in self.tasks.items():
            pairs = {metric: paired(self, self, name, metric) for metric in record.metrics()}
            found |= {name: {metric: asdict(gap) for metric, gap in pairs.items() if gap is not None}}
        return found

    @classmethod
    def load(cls, path: Path) -> TaskResults:
        """Read what ``save`` wrote. Raises ``UserError`` for a damaged file or one of another format."""
        raw = read_json(path)
        try:
            if raw["format"] != TASKS_FORMAT:
                raise ValueError(f"format {raw['format']!r} is not {TASKS_FORMAT}")
            raw = opened(raw, path, "restore it")
            return cls(
                model=raw["model"],
                tasks={name: _task(task) for name, task in raw["tasks"].items()},
                probes={name: ProbeRecord(**probe) for name, probe in raw["probes"].items()},
                made=raw["made"],
                environment=raw["environment"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is not a task results file of this version ({error}): delete it and run "
                "`trenchcoat eval --tasks` again"
            ) from error


def _task(raw: dict[str, Any]) -> TaskRecord:
    for score in raw["scores"].values():
        score["metrics"] = {
            name: Estimate(one["value"], number_or_nan(one["error"])) for name, one in score["metrics"].items()
        }
    past = raw.get("past_2w")
    raw["past_2w"] = None if past is None else (past[0], past[1])
    return TaskRecord(**{**raw, "scores": {model: ModelScore(**score) for model, score in raw["scores"].items()}})


def pooled_rows(results: TaskResults, name: str, model: str, metric: str) -> tuple[str, list[float]]:
    """(identity, values) of all rows of a task or group; empty if any are missing."""
    record = results.tasks[name]
    parts = [results.tasks[member] for member in record.members if member in results.tasks] or [record]
    rows, identity = [], []
    for part in parts:
        values = part.scores[model].rows.get(metric, []) if model in part.scores else []
        if len(values) != part.count or len(parts) != max(1, len(record.members)):
            return "", []
        rows += values
        identity.append(part.rows_id)
    return " ".join(identity), rows


def paired(
    a: TaskResults, b: TaskResults, name: str, metric: str, models: tuple[str, str] = (STUDENT, TEACHER)
) -> Estimate | None:
    """Metric of ``models[0]`` in ``a`` minus that of ``models[1]`` in ``b``, row by row; None if the rows differ."""
    if name not in a.tasks or name not in b.tasks:
        return None
    (one, left), (other, right) = pooled_rows(a, name, models[0], metric), pooled_rows(b, name, models[1], metric)
    if not left or not one.strip() or one != other or len(left) != len(right):
        return None
    return mean_estimate([x - y for x, y in zip(left, right, strict=True)])
