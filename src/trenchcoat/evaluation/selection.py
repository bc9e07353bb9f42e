"""Which key/value groups are worth keeping, how that was measured, and what each share of the cache closes.

The file ``selection.json`` in a run's folder. A group is one key/value head with its query heads; its name is
"layer.group", as in ``student.keep``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trenchcoat.config import UserError
from trenchcoat.runtime.files import read_json
from trenchcoat.runtime.sealed import opened, write_sealed

SELECTION_FILE = "selection.json"
SELECTION_FORMAT = 2

LayerScores = list[list[float]]
"""A number per key/value group, by layer; empty for a layer that keeps softmax attention anyway."""


@dataclass(frozen=True)
class FrontierPoint:
    """What keeping some groups closes without training; the others see the window and the sinks."""

    method: str
    groups: int
    """Groups kept besides the layers of ``student.keep_softmax``."""
    share: float
    """Those groups as a share of all groups of the model, 0 to 1."""
    text: float | None
    """Share closed of the loss gap past 2W between window + sinks (0) and the teacher (1); None: no gap to measure."""
    text_error: float | None
    copy: float | None
    """The same on the second half of a text that follows itself."""
    copy_error: float | None
    """Standard errors over the rows of text."""


@dataclass(frozen=True)
class Selection:
    """Scores of all groups, the groups chosen, and the frontier."""

    method: str
    scores: LayerScores
    """Higher is better: the sum of ``parts``, each divided by the sum of its positive entries."""
    parts: dict[str, LayerScores]
    """What was measured, e.g. ``text`` and ``copy``."""
    groups: int
    """Key/value groups of the whole model, those of ``student.keep_softmax`` included."""
    kept: tuple[str, ...] = ()
    """The groups chosen, best first."""
    frontier: tuple[FrontierPoint, ...] = ()
    gaps: dict[str, Any] = field(default_factory=dict)
    """``text`` and ``copy``: value and standard error, in nats a token, of the gap that the frontier closes."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings behind the scores."""
    base: str = ""
    """Fingerprint of the base weights."""

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.scores)

    def ranking(self) -> tuple[str, ...]:
        """Every group that can be chosen, best first."""
        return ranking(self.scores)

    def keep(self, number: int) -> tuple[str, ...]:
        """The best ``number`` groups, best first."""
        return self.ranking()[:number]

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        write_sealed(path, {"format": SELECTION_FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Selection:
        """Read what ``save`` wrote; ``UserError`` for another format or a damaged file."""
        raw = read_json(path)
        again = "delete it and run `trenchcoat select` again"
        if not isinstance(raw, Mapping) or raw.get("format") != SELECTION_FORMAT:
            found = raw.get("format") if isinstance(raw, Mapping) else None
            raise UserError(f"{path} has format {found!r}, but this version reads format {SELECTION_FORMAT}: {again}")
        missing = [one.name for one in fields(cls) if one.name not in raw]
        if missing:
            raise UserError(f"{path} has no {missing[0]!r}, so it is incomplete: {again}")
        raw = opened(raw, path, again)
        content: dict[str, Any] = {one.name: raw[one.name] for one in fields(cls)}
        try:
            points = tuple(FrontierPoint(**point) for point in content["frontier"])
            return cls(**{**content, "kept": tuple(content["kept"]), "frontier": points})
        except TypeError as error:
            raise UserError(f"{path} is no selection of this version ({error}): {again}") from error


def combined(parts: Mapping[str, LayerScores]) -> LayerScores:
    """The sum of the parts, each divided by the sum of its positive entries.

    Negative entries (attention to far text that makes the loss worse) count against their group; a part without
    positive entries is left out, as there is nothing to keep for its sake.
    """
    first = next(iter(parts.values()))
    total = [[0.0] * len(row) for row in first]
    for part in parts.values():
        positive = sum(max(value, 0.0) for row in part for value in row)
        if positive > 0:
            rows = zip(total, part, strict=True)
            total = [[a + b / positive for a, b in zip(old, new, strict=True)] for old, new in rows]
    return total


def ranking(scores: Sequence[Sequence[float]]) -> tuple[str, ...]:
    """Names of the groups from the highest score to the lowest; the earlier layer first where scores are equal."""
    named = [(-score, layer, group) for layer, row in enumerate(scores) for group, score in enumerate(row)]
    return tuple(f"{layer}.{group}" for _, layer, group in sorted(named))
