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

from trenchcoat.evaluation.columns import REPORT_COLUMNS
from trenchcoat.evaluation.rows import CONVERTED, REPORT_ROWS, TEACHER, UNTRAINED
from trenchcoat.evaluation.statistics import Estimate, RowSums, gap_closed
from trenchcoat.runtime.files import write_text

RESULTS_FILE = "results.json"
RESULTS_FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """What a command returns: texts and tables for the terminal, in order, and its results."""

    shown: tuple[Any, ...]
    results: Any = None


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

    def best_window_row(self) -> str | None:
        """Name of the best row without a far part on tokens past 2W; None if none was scored."""
        names = [name for name, row in REPORT_ROWS.items() if row.window_only and name in self.rows]
        return min(names, key=lambda name: self.rows[name].far.mean, default=None)

    def share_closed(self, name: str) -> Estimate | None:
        """Share of the loss gap between the untrained swap and the teacher that row ``name`` closes, all tokens."""
        return self._share(name, UNTRAINED, "all")

    def far_share_closed(self, name: str) -> Estimate | None:
        """Share of the gap between the best window-only row and the teacher closed by ``name``, past 2W."""
        return self._share(name, self.best_window_row(), "far")

    def _share(self, name: str, bottom: str | None, tokens: str) -> Estimate | None:
        if bottom not in self.rows or TEACHER not in self.rows:
            return None
        parts: list[RowSums] = [getattr(self.rows[key], tokens) for key in (name, bottom, TEACHER)]
        return gap_closed(*parts)

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
        values = {key: column.value(self, name) for key, column in REPORT_COLUMNS.items() if key not in figures}
        return figures | {key: asdict(value) if value else None for key, value in values.items()}

    def save(self, path: str | Path) -> None:
        """Write ``path`` as JSON, atomically. Raises ``SaveError`` when the disk is full."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        text = re.sub(r"\[[\s\d.,eE+null-]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
        write_text(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what ``save`` wrote. Raises ``ValueError`` for another format or a damaged file."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            if raw.get("format") != RESULTS_FORMAT:
                raise ValueError(f"format {raw.get('format')!r} is not {RESULTS_FORMAT}")
            return cls.from_dict(raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a results file of this version of trenchcoat ({error}). Run `trenchcoat eval` again."
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
    fields = {key: value for key, value in raw.items() if key != "summary"}
    for key in ("all", "far", "recall", "recall_hits"):
        fields[key] = RowSums([number_or_nan(x) for x in raw[key]["sums"]], raw[key]["counts"])
    fields["position_loss"] = [number_or_nan(x) for x in raw["position_loss"]]
    return Scores(**fields)


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
