"""Metrics for TensorBoard or Weights & Biases, only if a recipe enables them (``run.trackers``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trenchcoat.config import UserError


class MetricsTracker(Protocol):
    """Receives numbers in addition to ``metrics.jsonl``."""

    def add(self, stage: str, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of ``kind`` (train, eval) after ``step`` of ``stage``."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, directory: Path, project: str) -> None:
        _require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory / "tensorboard"))

    def add(self, stage: str, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """One scalar per number, named ``<stage>/<kind>/<number>``."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"{stage}/{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of ``project``; online or offline as in the user's wandb settings."""

    def __init__(self, directory: Path, project: str) -> None:
        _require("wandb", "wandb")
        import wandb

        self._run: Any = wandb.init(project=project, name=directory.name, dir=str(directory), resume="allow")

    def add(self, stage: str, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Stages count their steps separately, so the step is logged as a number."""
        prefix = f"{stage}/{kind}"
        self._run.log({f"{prefix}/{name}": value for name, value in numbers.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str], MetricsTracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""Name in a recipe (``run.trackers``) -> class."""


def open_trackers(names: Sequence[str], directory: Path, project: str) -> list[MetricsTracker]:
    """The trackers by name; raises ``UserError`` for one whose package is not installed."""
    return [TRACKERS[name](directory, project) for name in names]


def _require(tracker: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"run.trackers names {tracker}, but {package} is not installed: pip install {package}")
