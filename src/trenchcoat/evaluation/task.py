"""What a task or probe is: a name, a description, and how a model is scored on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from trenchcoat.evaluation.loglikelihood import LoglikelihoodScorer
    from trenchcoat.evaluation.task_results import ProbeRecord, TaskRecord

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Lengths of a probe's rows, as multiples of a training row."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What ``trenchcoat eval --tasks`` scores."""

    tasks: tuple[str, ...]
    """Names of ``OWN_TASKS`` or of the harness's tasks."""
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    """Rows per forward pass; None: automatic."""
    max_length: int | None = None
    task_dir: Path | None = None
    data_dir: Path | None = None
    teacher: str | None = None
    """Score the teacher too: an empty string for the run's or adapter's base, else the teacher's folder."""
    share: bool = True
    """Read shared prefixes once."""
    device: str = "auto"
    probe_lengths: tuple[float, ...] = LENGTHS
    probe_rows: int = 16
    trained: int | None = None
    """Tokens of a training row, if there is no recipe."""
    window: int | None = None
    """W of the linearized model, in tokens; None: unknown."""

    def past_2w(self, requests: Iterable[tuple[Sequence[int], Sequence[int]]]) -> tuple[int, int] | None:
        """(tokens to score that have more than 2W tokens before them, all tokens to score) of pairs of token ids,
        context and continuation; None if W is unknown."""
        if self.window is None:
            return None
        sizes = [(len(context), len(continuation)) for context, continuation in requests]
        past = sum(min(asked, max(0, before + asked - 2 * self.window - 1)) for before, asked in sizes)
        return past, sum(asked for _, asked in sizes)


@dataclass(frozen=True)
class ScoredModel:
    """A model to score."""

    name: str
    """``student``, ``far_off`` or ``teacher``."""
    scorer: LoglikelihoodScorer
    tokenizer: Any
    held_out: Callable[[], list[int]]
    """Token ids of held-out text."""


class EvalTask:
    """One task of ``--tasks``. To add one, write a class and list it in ``own_tasks.py``."""

    name: str
    """Its name on the command line and in ``tasks.json``."""
    description: str
    every_process: ClassVar[bool] = False
    """Scored by all processes together; otherwise by the first one alone."""
    long_context: ClassVar[bool] = False
    """Made from held-out text at multiples of a training row, and scored with the far part off too."""

    def score(self, model: ScoredModel, plan: TaskPlan) -> Mapping[str, TaskRecord | ProbeRecord]:
        """Records by name, with this model's scores. Raises ``UserError`` for missing data."""
        raise NotImplementedError
