"""Evaluation results: the scores of each row of the report, and the file ``results.json``.

Everything in the report is computed from these numbers, so it can be rewritten without a model.
Losses are in nats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trenchcoat.config import UserError
from trenchcoat.evaluation.columns import report_columns
from trenchcoat.evaluation.rows import CONVERTED, KEPT_WINDOW, REPORT_ROWS, TEACHER, WINDOW
from trenchcoat.evaluation.statistics import NOTHING, Estimate, RowSums, gap_closed, paired_difference
from trenchcoat.runtime.files import read_json, write_text
from trenchcoat.runtime.sealed import opened, sealed

RESULTS_FILE = "results.json"
RESULTS_FORMAT = 3


@dataclass(frozen=True)
class Outcome:
    """What a command returns: texts and tables for the terminal, in order, and its results."""

    shown: tuple[Any, ...]
    results: Any = None


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a generation cache for one sequence: ``constant + per_token * tokens``, and layers that stop growing."""

    constant: int
    per_token: int
    limited: list[tuple[int, int]] = field(default_factory=list)
    """(bytes a token, tokens that it holds at most) of each layer with a window of its own."""

    def at(self, tokens: int) -> int:
        """Bytes after ``tokens`` tokens."""
        return self.constant + self.per_token * tokens + sum(rate * min(tokens, most) for rate, most in self.limited)


@dataclass(frozen=True)
class LengthScores:
    """Scores of one model on rows of one length."""

    far: RowSums
    """Loss over counted tokens that have more than 2 x window tokens before them."""
    near: RowSums
    """Loss over counted tokens whose whole past is in the near part of a student (the first 2 x window of a terrace):
    there it computes what the teacher computes, unless its weights were trained."""
    copy: RowSums = NOTHING
    """Loss over the second half of rows that are a text of half their length followed by itself."""
    copy_hits: RowSums = NOTHING
    """Tokens of that half that are the model's first choice."""


@dataclass(frozen=True)
class Scores:
    """Scores of one model on N rows of T tokens (see ``trenchcoat.evaluation.scoring.score``)."""

    window: int
    seq_len: int
    all: RowSums
    """Loss over all counted tokens."""
    far: RowSums
    """Loss over counted tokens that have more than 2 x window tokens before them."""
    recall: RowSums
    """Loss over the recall probes."""
    recall_hits: RowSums
    """Recall probes whose token is the model's first choice."""
    position_loss: list[float]
    """[T - 1] mean loss at each position; NaN where no row counts."""
    position_count: list[int]
    """[T - 1] rows that count at each position."""
    near: RowSums = NOTHING
    """As in ``LengthScores``."""
    copy: RowSums = NOTHING
    copy_hits: RowSums = NOTHING
    random_hits: RowSums = NOTHING
    """As ``copy_hits``, of random tokens followed by themselves."""
    cache: CacheSize | None = None
    """Its generation cache; None where it was not measured."""
    longer: dict[int, LengthScores] = field(default_factory=dict)
    """Factor -> scores on rows of so many times T tokens."""
    seconds: float = 0.0
    """Wall time of the scoring."""

    @property
    def perplexity(self) -> float:
        """exp(mean loss) over all counted tokens."""
        return self.all.perplexity

    @property
    def far_perplexity(self) -> float:
        """exp(mean loss) over tokens past 2 x window."""
        return self.far.perplexity

    def at(self, factor: int) -> LengthScores | None:
        """Scores on rows of ``factor`` x T tokens; None if they were not measured."""
        own = LengthScores(self.far, self.near, self.copy, self.copy_hits)
        return own if factor == 1 else self.longer.get(factor)


@dataclass(frozen=True)
class DecodePoint:
    """Decoding at one context length, batch of one."""

    context: int
    """Tokens in the cache when timing starts."""
    ms_per_token: float
    """Median time of a one-token step, in milliseconds."""
    ms_quartiles: tuple[float, float]
    """Lower and upper quartile of that time."""
    prefill_ms: float
    """Time to read the context in one call."""
    cache_bytes: int
    """Bytes held by the cache's tensors after the context is read."""
    ms_mean: float = math.nan
    """Mean time of a step; unlike the median it includes periodic work and disturbances."""


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuations by several models."""

    prompt: str
    outputs: dict[str, str]
    """Row name (``teacher``, ``transfer_lora``, ...) -> continuation."""


@dataclass(frozen=True)
class StageFacts:
    """What one training stage did."""

    name: str
    """``transfer``, ``lora``, ``lora_only``, ``window_sinks_lora`` or another stage's name."""
    steps: int
    tokens: int
    seconds: float
    best_loss: float = math.nan
    """Best evaluation loss."""


@dataclass
class Results:
    """Everything a report is written from; ``save`` and ``load`` keep all of it in ``results.json``."""

    window: int
    seq_len: int
    rows: dict[str, Scores] = field(default_factory=dict)
    """Row name -> scores, all on the same text."""
    decode: dict[str, list[DecodePoint]] = field(default_factory=dict)
    """``teacher`` and ``student`` -> decoding curve."""
    model: dict[str, Any] = field(default_factory=dict)
    """``groups`` (key/value heads of all layers) and ``kept groups``."""
    samples: list[Sample] = field(default_factory=list)
    stages: list[StageFacts] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe as nested dictionaries."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, devices, git revision, threads."""
    data: dict[str, Any] = field(default_factory=dict)
    """The source of the text; rows and tokens read, dropped and scored."""
    implementation: str = ""
    """The implementation of the operator, e.g. ``chunkwise``."""
    seconds: float = math.nan
    """Wall time of the whole run."""
    notes: list[str] = field(default_factory=list)
    """Remarks, shown in the report verbatim."""

    def ordered_rows(self) -> list[tuple[str, Scores]]:
        """The rows in the order of the table, unregistered names last."""
        return [(name, self.rows[name]) for name in dict.fromkeys([*REPORT_ROWS, *self.rows]) if name in self.rows]

    def converted(self) -> str | None:
        """Name of the converted model's row, that of the last stage trained; None if no stage was."""
        return next((name for name in CONVERTED if name in self.rows), None)

    def untrained_rival(self) -> str | None:
        """Name of the row that keeps as much as the converted model and trains nothing: kept groups with window +
        sinks, or window + sinks; None if neither was scored."""
        return next((name for name in (KEPT_WINDOW, WINDOW) if name in self.rows), None)

    def crossing(self) -> int | None:
        """Tokens of context from which the converted model decodes faster than the teacher, up to the longest measured
        (between two lengths: on a straight line of the logarithms); None where it does not, or was not measured."""
        teacher = {point.context: point.ms_per_token for point in self.decode.get("teacher", [])}
        student = {point.context: point.ms_per_token for point in self.decode.get("student", [])}
        contexts = sorted(teacher.keys() & student.keys())
        slower = [student[context] >= teacher[context] for context in contexts]
        if not contexts or slower[-1]:
            return None
        if True not in slower:
            return contexts[0]
        before = max(i for i, one in enumerate(slower) if one)
        low, high = (math.log(student[contexts[i]] / teacher[contexts[i]]) for i in (before, before + 1))
        position = low / (low - high)
        return round(contexts[before] * (contexts[before + 1] / contexts[before]) ** position)

    def factors(self) -> list[int]:
        """Lengths that a row was scored at, as multiples of ``seq_len``, ascending."""
        return sorted({1, *(factor for scores in self.rows.values() for factor in scores.longer)})

    def shift(self, name: str) -> Estimate | None:
        """Loss of row ``name`` minus the teacher's where a student's near part holds the whole past of a token; None
        for the teacher, and where it was not measured."""
        if name == TEACHER or TEACHER not in self.rows:
            return None
        near = [self.rows[key].near for key in (name, TEACHER)]
        return paired_difference(*near) if near[0].count else None

    def far_closed(self, name: str, factor: int = 1, *, corrected: bool = False) -> Estimate | None:
        """Share of the gap between untrained window + sinks and the teacher that row ``name`` closes past 2W.

        ``factor``: on rows of so many times ``seq_len``. ``corrected``: with the row's shift on the same rows taken off
        its loss.
        """
        found = self._three(name, factor)
        if found is None:
            return None
        row, bottom, teacher = found
        if corrected and not row.near.count:
            return None
        return gap_closed(row.far, bottom.far, teacher.far, (row.near, teacher.near) if corrected else None)

    def copy_closed(self, name: str, factor: int = 1) -> Estimate | None:
        """The same share of the loss on copied text."""
        found = self._three(name, factor)
        if found is None or not all(scores.copy.count for scores in found):
            return None
        row, bottom, teacher = found
        return gap_closed(row.copy, bottom.copy, teacher.copy)

    def _three(self, name: str, factor: int) -> list[LengthScores] | None:
        """Scores of row ``name``, of untrained window + sinks and of the teacher at one length, if all exist."""
        found = [self.rows[key].at(factor) for key in (name, WINDOW, TEACHER) if key in self.rows]
        there = [scores for scores in found if scores is not None]
        return there if len(there) == 3 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        plain = json_ready({"format": RESULTS_FORMAT, **asdict(self)})
        for name, scores in self.rows.items():
            plain["rows"][name]["summary"] = json_ready(self._summary(name, scores))
        return plain

    def _summary(self, name: str, scores: Scores) -> dict[str, Any]:
        """The numbers in the table, for readers of the JSON file; ``load`` ignores them."""
        figures = {
            "loss": scores.all.mean,
            "loss_error": scores.all.error,
            "perplexity": scores.perplexity,
            "loss_past_2w": scores.far.mean,
            "loss_past_2w_error": scores.far.error,
            "perplexity_past_2w": scores.far_perplexity,
            "recall_accuracy": scores.recall_hits.mean,
            "recall_accuracy_error": scores.recall_hits.error,
            "recall_loss": scores.recall.mean,
            "recall_probes": scores.recall.count,
        }
        values = {column.key: column.value(self, name) for column in report_columns(self) if column.key not in figures}
        return figures | {key: asdict(value) if value else None for key, value in values.items()}

    def save(self, path: str | Path) -> None:
        """Write ``path`` as JSON, atomically. Raises ``SaveError`` when the disk is full."""
        text = json.dumps(sealed(self.to_dict()), indent=1, allow_nan=False)
        text = re.sub(r"\[[\s\d.,eE+null-]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
        write_text(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what ``save`` wrote. Raises ``UserError`` for another format or a damaged file."""
        try:
            raw = read_json(Path(path))
            if raw.get("format") != RESULTS_FORMAT:
                raise ValueError(f"its format is {raw.get('format')!r}, and {RESULTS_FORMAT} is read")
            return cls.from_dict(opened(raw, Path(path), "restore it"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is not a results file of this version of trenchcoat ({error}): score the run again with "
                f"`trenchcoat eval {Path(path).parent}`"
            ) from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Results:
        """The inverse of ``to_dict``."""
        fields = {key: value for key, value in raw.items() if key != "format"}
        fields["rows"] = {name: _scores(value) for name, value in raw["rows"].items()}
        fields["decode"] = {
            mode: [
                DecodePoint(**{**p, "ms_quartiles": tuple(p["ms_quartiles"]), "ms_mean": number_or_nan(p["ms_mean"])})
                for p in points
            ]
            for mode, points in raw["decode"].items()
        }
        fields["samples"] = [Sample(**sample) for sample in raw["samples"]]
        fields["stages"] = [StageFacts(**{**s, "best_loss": number_or_nan(s["best_loss"])}) for s in raw["stages"]]
        fields["seconds"] = number_or_nan(raw["seconds"])
        return cls(**fields)


def _scores(raw: Mapping[str, Any]) -> Scores:
    fields = _with_sums(raw)
    fields["position_loss"] = [number_or_nan(x) for x in raw["position_loss"]]
    if raw["cache"] is not None:
        limited = [(rate, most) for rate, most in raw["cache"]["limited"]]
        fields["cache"] = CacheSize(raw["cache"]["constant"], raw["cache"]["per_token"], limited)
    fields["longer"] = {int(factor): LengthScores(**_with_sums(part)) for factor, part in raw["longer"].items()}
    return Scores(**fields)


def _with_sums(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``raw`` without its summary, sums as ``RowSums``."""
    return {
        key: RowSums([number_or_nan(x) for x in value["sums"]], value["counts"])
        if isinstance(value, Mapping) and value.keys() == {"sums", "counts"}
        else value
        for key, value in raw.items()
        if key != "summary"
    }


def number_or_nan(value: float | None) -> float:
    """The inverse of ``json_ready`` for a number."""
    return math.nan if value is None else float(value)


def json_ready(value: Any) -> Any:
    """Plain JSON values; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
