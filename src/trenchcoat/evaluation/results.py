"""What an evaluation found, as data: scores of each row of the report, their noise, and the file ``results.json``.

Everything the report says is computed from these numbers, so a report can be written again without a model.
Losses are in nats. Noise is a bootstrap over the evaluated rows of text (B. Efron, 1979): resampling rows, not
tokens, because the tokens of one row are not independent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trenchcoat.runtime.files import write_text

TEACHER = "teacher"
UNTRAINED = "untrained_swap"
TRANSFER_ONLY = "transfer_only"
LORA_ONLY = "lora_only"
TRANSFER_LORA = "transfer_lora"
FAR_OFF = "far_off"
WINDOW_SINKS = "window_sinks"
WINDOW_SINKS_LORA = "window_sinks_lora"

ROW_LABELS: dict[str, str] = {
    TEACHER: "teacher",
    UNTRAINED: "untrained swap",
    TRANSFER_ONLY: "transfer only",
    LORA_ONLY: "LoRA only (no transfer)",
    TRANSFER_LORA: "transfer + LoRA",
    FAR_OFF: "the same, far part off",
    WINDOW_SINKS: "window + sinks, untrained",
    WINDOW_SINKS_LORA: "window + sinks + LoRA",
}
"""Rows of the table in their order; a row outside this list is shown under its own name, after them."""

BOOTSTRAP_DRAWS = 2000
FORMAT_VERSION = 1


@cache
def _bootstrap_weights(rows: int) -> Tensor:
    """[BOOTSTRAP_DRAWS, rows] float64: how often each row is drawn; the same draws for everyone, so they are paired."""
    generator = torch.Generator().manual_seed(20)
    drawn = torch.randint(rows, (BOOTSTRAP_DRAWS, rows), generator=generator)
    counts = torch.zeros(BOOTSTRAP_DRAWS, rows, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


@dataclass(frozen=True)
class RowSums:
    """A quantity summed over the counted tokens of each evaluated row of text: lists of length N."""

    sums: list[float]
    counts: list[int]

    @property
    def count(self) -> int:
        """Tokens counted over all rows."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Mean over tokens; NaN when nothing was counted."""
        return sum(self.sums) / self.count if self.count else math.nan

    def replicates(self) -> Tensor:
        """[BOOTSTRAP_DRAWS] float64: the mean in each resampling of the rows."""
        weights = _bootstrap_weights(len(self.counts))
        sums = torch.tensor(self.sums, dtype=torch.float64)
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return (weights @ sums) / (weights @ counts)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN with fewer than two rows that count."""
        if sum(1 for count in self.counts if count) < 2:
            return math.nan
        return _spread(self.replicates())


def _spread(values: Tensor) -> float:
    """Standard deviation over the resamplings in which the quantity exists."""
    finite = values[torch.isfinite(values)]
    return float(finite.std()) if len(finite) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """``value`` with its standard error."""

    value: float
    error: float

    @property
    def clear(self) -> bool:
        """True when the value is more than two standard errors from zero."""
        return math.isfinite(self.value) and math.isfinite(self.error) and abs(self.value) > 2 * self.error


def paired_difference(a: RowSums, b: RowSums) -> Difference:
    """Mean of ``a`` minus mean of ``b`` on the same tokens; the error is of the difference, not of each.

    Raises ``ValueError`` when both were not counted on the same tokens.
    """
    if a.counts != b.counts:
        raise ValueError(
            f"cannot compare scores of different tokens: {a.count} tokens in {len(a.counts)} rows against "
            f"{b.count} in {len(b.counts)}. Score both models on the same rows with the same window."
        )
    gap = RowSums([x - y for x, y in zip(a.sums, b.sums, strict=True)], a.counts)
    return Difference(gap.mean, gap.error)


def gap_closed(row: RowSums, bottom: RowSums, top: RowSums) -> Difference | None:
    """Share (bottom - row) / (bottom - top) of the loss gap that ``row`` closes: 0 is ``bottom``, 1 is ``top``.

    None when the gap itself is not clearly above its noise: a share of nothing means nothing.
    """
    gap = paired_difference(bottom, top)
    if not (gap.clear and gap.value > 0):
        return None
    closed = paired_difference(bottom, row)
    if row.sums == top.sums:
        return Difference(1.0, 0.0)
    low, high = bottom.replicates(), top.replicates()
    return Difference(closed.value / gap.value, _spread((low - row.replicates()) / (low - high)))


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
        return _exp(self.all.mean)

    @property
    def far_perplexity(self) -> float:
        """exp(mean loss) over tokens past 2 x window."""
        return _exp(self.far.mean)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@dataclass(frozen=True)
class DecodePoint:
    """Decoding at one context length, batch of one."""

    context: int
    """Tokens already in the cache when timing starts."""
    ms_per_token: float
    """Median time of a one-token step, in milliseconds."""
    ms_quartiles: tuple[float, float]
    """Lower and upper quartile of that time."""
    prefill_ms: float
    """Time of the one call that reads the context."""
    cache_bytes: int
    """Bytes held by the cache's tensors after the context is read."""
    ms_mean: float = math.nan
    """Mean time of the steps: it has its share of work that is done only every so many tokens, and of disturbances."""


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuations by several models."""

    prompt: str
    outputs: dict[str, str]
    """Row name (``teacher``, ``transfer_lora``, ...) to continuation."""


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
    """Row name to scores, all on the same text."""
    decode: dict[str, list[DecodePoint]] = field(default_factory=dict)
    """``teacher`` and ``student`` to their decoding curve."""
    samples: list[Sample] = field(default_factory=list)
    stages: list[StageFacts] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe as nested dictionaries."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, devices, git revision, threads."""
    data: dict[str, Any] = field(default_factory=dict)
    """Where the text came from and how many rows and tokens were read, dropped and scored."""
    implementation: str = ""
    """The operator's implementation that ran, e.g. ``chunkwise``."""
    seconds: float = math.nan
    """Wall time of the whole run."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the reader, shown in the report as they are."""

    def ordered_rows(self) -> list[tuple[str, Scores]]:
        """The rows in the order of ``ROW_LABELS``, unknown names last."""
        known = [name for name in ROW_LABELS if name in self.rows]
        return [(name, self.rows[name]) for name in [*known, *(n for n in self.rows if n not in ROW_LABELS)]]

    def converted(self) -> str | None:
        """Name of the row the run was for: the last stage that was trained; None when there is none."""
        return next((name for name in (TRANSFER_LORA, TRANSFER_ONLY, LORA_ONLY) if name in self.rows), None)

    def best_window_sinks(self) -> str | None:
        """Name of the better window + sinks row on tokens past 2W; None when neither was scored."""
        names = [name for name in (WINDOW_SINKS, WINDOW_SINKS_LORA) if name in self.rows]
        return min(names, key=lambda name: self.rows[name].far.mean, default=None)

    def share_closed(self, name: str) -> Difference | None:
        """Share of the loss gap between the untrained swap and the teacher that row ``name`` closes, all tokens."""
        return self._share(name, UNTRAINED, "all")

    def far_share_closed(self, name: str) -> Difference | None:
        """Share of the gap between the better window + sinks row and the teacher closed by ``name``, past 2W."""
        return self._share(name, self.best_window_sinks(), "far")

    def _share(self, name: str, bottom: str | None, tokens: str) -> Difference | None:
        if bottom not in self.rows or TEACHER not in self.rows:
            return None
        parts: list[RowSums] = [getattr(self.rows[key], tokens) for key in (name, bottom, TEACHER)]
        return gap_closed(*parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        plain = _plain({"format": FORMAT_VERSION, **asdict(self)})
        for name, scores in self.rows.items():
            plain["rows"][name]["summary"] = _plain(self._summary(name, scores))
        return plain

    def _summary(self, name: str, scores: Scores) -> dict[str, Any]:
        """The table's figures, for readers of the JSON file; not read back."""
        share, far_share = self.share_closed(name), self.far_share_closed(name)
        return {
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
            "share_closed": asdict(share) if share else None,
            "far_share_closed": asdict(far_share) if far_share else None,
        }

    def save(self, path: str | Path) -> None:
        """Write ``path`` as JSON, whole or not at all. Raises ``SaveError`` when the disk is full."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        text = re.sub(r"\[[\s\d.,eE+null-]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)
        write_text(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what ``save`` wrote. Raises ``ValueError`` for a file of another format or one that is damaged."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            if raw.get("format") != FORMAT_VERSION:
                raise ValueError(f"format {raw.get('format')!r} is not {FORMAT_VERSION}")
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
                DecodePoint(**{**p, "ms_quartiles": tuple(p["ms_quartiles"]), "ms_mean": _number(p["ms_mean"])})
                for p in points
            ]
            for mode, points in raw["decode"].items()
        }
        fields["samples"] = [Sample(**sample) for sample in raw["samples"]]
        fields["stages"] = [StageFacts(**{**s, "best_loss": _number(s["best_loss"])}) for s in raw["stages"]]
        fields["seconds"] = _number(raw["seconds"])
        return cls(**fields)


def _scores(raw: Mapping[str, Any]) -> Scores:
    fields = {key: value for key, value in raw.items() if key != "summary"}
    for key in ("all", "far", "recall", "recall_hits"):
        fields[key] = RowSums([_number(x) for x in raw[key]["sums"]], raw[key]["counts"])
    fields["position_loss"] = [_number(x) for x in raw["position_loss"]]
    return Scores(**fields)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
