"""What tasks and probes found, as data: the file ``tasks.json``, standard errors, paired differences, intervals.

A task keeps the result of every row it scored, so that two models on the same rows are compared row by row: the error
of a difference is that of the paired differences, which is smaller than the errors of the two sides suggest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trenchcoat.config import UserError
from trenchcoat.evaluation.results import Difference
from trenchcoat.runtime.files import read_json, write_json

FORMAT_VERSION = 1
STUDENT, TEACHER, FAR_OFF = "student", "teacher", "far_off"
MODEL_LABELS = {STUDENT: "linear", FAR_OFF: "far part off", TEACHER: "teacher"}
"""The models of a record in their order."""
NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)
"""Standard errors in half a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its standard error (None where the task gives none)."""

    value: float
    error: float | None = None


@dataclass
class ModelScore:
    """One model on one task."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)
    """Metric to its value on every row, in the task's order; empty for groups and for metrics that are no mean."""
    too_long: int = 0
    """Rows counted as wrong because their prompts were over a limit (``mmlu_letters`` with a ``max_length``)."""


@dataclass
class TaskRecord:
    """One task (or group of tasks), and the models scored on it."""

    name: str
    alias: str
    count: int
    """Rows scored."""
    rows_id: str = ""
    """Identity of the rows, their prompts included: equal where results can be compared row by row."""
    members: list[str] = field(default_factory=list)
    """Tasks of a group; empty for a task."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Few-shot examples, limit, seeds, version of the task, where its rows came from."""
    scores: dict[str, ModelScore] = field(default_factory=dict)
    """``student`` and ``teacher``."""


@dataclass
class ProbeRecord:
    """One long-context probe: shares of right tokens by length and depth."""

    name: str
    lengths: list[int]
    depths: list[float]
    """Where in the text the answer stands, 0 at its beginning; one entry where the probe has no depth."""
    trained: int
    """Tokens of the rows that the model was trained on."""
    chance: float | None = None
    """What guessing gives, where that is known."""
    settings: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    """Model (``student``, ``far_off``, ``teacher``) to [length][depth][row]."""
    controls: dict[str, list[list[float]]] = field(default_factory=dict)
    """Model to [length][row] of the same question without what it asks for; no lengths where chance is known."""

    def mean(self, model: str, length: int, depth: int) -> float:
        """Mean share of a cell."""
        return statistics.fmean(self.shares[model][length][depth])


@dataclass
class TaskResults:
    """Everything in ``tasks.json``."""

    model: str
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    probes: dict[str, ProbeRecord] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    """One entry a model and call: tasks, seconds, rows, tokens given and tokens read."""
    environment: dict[str, Any] = field(default_factory=dict)

    def add(self, other: TaskResults) -> None:
        """Take over what ``other`` has: scores join a record of the same rows and settings, else they replace it."""
        for name, task in other.tasks.items():
            known = self.tasks.get(name)
            if known is not None and (known.rows_id, known.members, known.settings) == (
                task.rows_id,
                task.members,
                task.settings,
            ):
                known.scores |= task.scores
            else:
                self.tasks[name] = task
        for name, probe in other.probes.items():
            before = self.probes.get(name)
            if before is not None and _same_probe(before, probe):
                before.shares |= probe.shares
                before.controls |= probe.controls
            else:
                self.probes[name] = probe
        self.made += other.made
        self.environment = other.environment

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        write_json(path, _finite({"format": FORMAT_VERSION, **asdict(self), "differences": self._differences()}))

    def _differences(self) -> dict[str, Any]:
        """Student minus teacher by task and metric, for readers of the file; not read back."""
        found: dict[str, Any] = {}
        for name, record in self.tasks.items():
            pairs = {metric: paired(self, self, name, metric) for metric in _metrics(record)}
            found |= {name: {metric: asdict(gap) for metric, gap in pairs.items() if gap is not None}}
        return found

    @classmethod
    def load(cls, path: Path) -> TaskResults:
        """Read what ``save`` wrote. Raises ``UserError`` for a damaged file or one of another format."""
        raw = read_json(path)
        try:
            if raw["format"] != FORMAT_VERSION:
                raise ValueError(f"format {raw['format']!r} is not {FORMAT_VERSION}")
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


def _same_probe(a: ProbeRecord, b: ProbeRecord) -> bool:
    return (a.lengths, a.depths, a.trained, a.settings) == (b.lengths, b.depths, b.trained, b.settings)


def _task(raw: dict[str, Any]) -> TaskRecord:
    scores = {
        model: ModelScore(**{**score, "metrics": {name: Estimate(**one) for name, one in score["metrics"].items()}})
        for model, score in raw["scores"].items()
    }
    return TaskRecord(**{**raw, "scores": scores})


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _metrics(record: TaskRecord) -> list[str]:
    return list(dict.fromkeys(metric for score in record.scores.values() for metric in score.metrics))


def mean_estimate(rows: Sequence[float]) -> Estimate:
    """Mean over rows and its standard error (sample standard deviation / sqrt(n))."""
    error = statistics.stdev(rows) / math.sqrt(len(rows)) if len(rows) > 1 else None
    return Estimate(statistics.fmean(rows), error)


def pooled_rows(results: TaskResults, name: str, model: str, metric: str) -> tuple[str, list[float]]:
    """(identity, values) of all rows behind a task or group; empty when a row is not known."""
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
) -> Difference | None:
    """Metric of ``models[0]`` in ``a`` minus that of ``models[1]`` in ``b``, row by row; None when rows differ."""
    if name not in a.tasks or name not in b.tasks:
        return None
    (one, left), (other, right) = pooled_rows(a, name, models[0], metric), pooled_rows(b, name, models[1], metric)
    if not left or not one.strip() or one != other or len(left) != len(right):
        return None
    gap = mean_estimate([x - y for x, y in zip(left, right, strict=True)])
    return Difference(gap.value, math.nan if gap.error is None else gap.error)


def interval(estimate: Estimate, rows: Sequence[float] = ()) -> tuple[float, float] | None:
    """95 % interval: Wilson's (1927) for rows that are 0 or 1, else the normal one; None where no error is known."""
    if rows and set(rows) <= {0.0, 1.0}:
        n, p, z2 = len(rows), statistics.fmean(rows), NORMAL_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = NORMAL_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return centre - half, centre + half
    if estimate.error is None or not math.isfinite(estimate.error):
        return None
    return estimate.value - NORMAL_95 * estimate.error, estimate.value + NORMAL_95 * estimate.error
