"""The record of a run: ``metrics.jsonl``, ``environment.json``, ``recipe.yaml``, and the progress display.

``metrics.jsonl`` holds one JSON object per line. Every line has ``kind`` and ``time`` (seconds since the epoch):

    {"kind": "train", "stage": "transfer", "step": 12, "loss": 3.1, "lr": 0.01, "grad_norm": 0.8, "tokens": 98304,
     "seconds": 5.2, "loss/layer_00": ..., ...}                      after optimizer step 12 (steps count from 1)
    {"kind": "eval", "stage": "transfer", "step": 0, "loss": 9.7, "seconds": 1.1, ...}          step 0 is untrained
    {"kind": "info" | "warning", "text": "..."}                      what happened, as a sentence
    {"kind": "result", "stage": "transfer", "step": 100, ...}        the end of a stage

``tokens`` and ``seconds`` of a train line are totals since the stage began; numbers that are not finite are written as
the strings "nan", "inf" and "-inf" (JSON has none). On resuming, lines after the checkpoint's step are dropped.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trenchcoat.config.package import DISTRIBUTION
from trenchcoat.runtime.files import saving, write_json, write_text

if TYPE_CHECKING:
    from trenchcoat.runtime.trackers import MetricsTracker

METRICS_FILE = "metrics.jsonl"
PLAIN_EVERY_SECONDS = 10.0
"""Minimum time between two lines of plain progress."""
_PACKAGES = (DISTRIBUTION, "torch", "transformers", "peft", "datasets", "safetensors", "numpy")


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's ``metrics.jsonl`` (a line truncated by a kill is skipped); [] when absent."""
    path = Path(directory) / METRICS_FILE
    if not path.is_file():
        return []
    return [line for line in map(_parse, path.read_text(encoding="utf-8", errors="replace").splitlines()) if line]


def _parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and "kind" in line else None


def environment(**more: Any) -> dict[str, Any]:
    """Versions, git revision of the source, machine, devices; plus ``more`` (e.g. ``implementation="chunkwise"``)."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "git_revision": _git_revision(),
        "cuda_devices": devices,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **more,
    }


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        top = _git(here, "rev-parse", "--show-toplevel")
        if Path(top) not in here.parents or "site-packages" in here.parts:
            return None
        dirty = "+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else ""
        return _git(here, "rev-parse", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None


def _git(where: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


class Tracker(Protocol):
    """What ``RunLog.progress`` yields."""

    def update(self, step: int, **numbers: float) -> None:
        """Show that ``step`` is done, with a few numbers."""


class _Silent:
    def update(self, step: int, **numbers: float) -> None:
        """Show nothing."""


class _Bar:
    def __init__(self, bar: Progress, task: Any) -> None:
        self.bar, self.task = bar, task

    def update(self, step: int, **numbers: float) -> None:
        """Show that ``step`` is done."""
        self.bar.update(self.task, completed=step, numbers=_short(numbers))


class _Plain:
    """A line every ``PLAIN_EVERY_SECONDS``, and one at the end, with the rate and the time left."""

    def __init__(self, console: Console, title: str, total: int, start: int, unit: str) -> None:
        self.console, self.title, self.total, self.first, self.unit = console, title, total, start, unit
        self.began = time.monotonic()
        self.printed = -math.inf

    def update(self, step: int, **numbers: float) -> None:
        """Show that ``step`` is done."""
        now = time.monotonic()
        if step < self.total and now - self.printed < PLAIN_EVERY_SECONDS:
            return
        self.printed = now
        done, elapsed = step - self.first, now - self.began
        left = f", {_clock(elapsed / done * (self.total - step))} left" if done > 0 and step < self.total else ""
        rate = f" ({done / elapsed:.2f} {self.unit}/s{left})" if done > 0 and elapsed > 0 else ""
        self.console.print(
            f"{self.title} {step}/{self.total}{rate} {_short(numbers)}", highlight=False, markup=False, soft_wrap=True
        )


def _short(numbers: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


@contextmanager
def show_progress(
    title: str,
    total: int,
    start: int = 0,
    *,
    console: Console | None = None,
    display: str = "auto",
    unit: str = "steps",
) -> Iterator[Tracker]:
    """Show progress from ``start`` to ``total`` steps (or another ``unit``) on standard error, as ``run.progress`` says
    (``display``): a bar on a terminal, else plain lines."""
    if display == "off":
        yield _Silent()
        return
    console = console if console is not None else Console(stderr=True)
    if display == "plain" or (display == "auto" and not console.is_terminal):
        yield _Plain(console, title, total, start, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _Bar(bar, bar.add_task(title, total=total, completed=start, numbers=""))


def show_line(text: str, display: str = "auto") -> None:
    """Show a sentence on standard error, unless ``run.progress`` is off."""
    if display != "off":
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


class RunLog:
    """Writes the record of one run under ``directory`` and shows progress on standard error.

    ``progress``: ``auto`` (a bar on a terminal, plain lines otherwise), ``bar``, ``plain`` or ``off`` (nothing shown
    but warnings; everything is still recorded). ``trackers`` get the numbers too. Raises ``SaveError``
    when the folder cannot be written.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        progress: str = "auto",
        console: Console | None = None,
        trackers: Sequence[MetricsTracker] = (),
    ) -> None:
        self.directory = Path(directory)
        self.console = console if console is not None else Console(stderr=True)
        if progress not in ("auto", "bar", "plain", "off"):
            raise ValueError(f"progress={progress!r}; expected auto, bar, plain or off")
        self.label = ""
        """Prefix of the progress title."""
        self.display = ("bar" if self.console.is_terminal else "plain") if progress == "auto" else progress
        with saving(self.metrics_path):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._end_cut_line()
        self._trackers = list(trackers)
        with saving(self.metrics_path):
            self._file = self._append()

    @property
    def metrics_path(self) -> Path:
        """Where the lines go."""
        return self.directory / METRICS_FILE

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's training checkpoints."""
        return self.directory / "checkpoints" / stage

    def _append(self) -> TextIO:
        return open(self.metrics_path, "a", encoding="utf-8")

    def _end_cut_line(self) -> None:
        if self.metrics_path.is_file():
            with open(self.metrics_path, "rb+") as file:
                if file.seek(0, os.SEEK_END) > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")

    def log(self, kind: str, **content: Any) -> None:
        """Append one line; numbers, strings, lists and dicts of them. It is flushed to the operating system at once."""
        line = {
            "kind": kind,
            **{name: _jsonable(value) for name, value in content.items()},
            "time": round(time.time(), 3),
        }
        with saving(self.metrics_path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if kind in ("train", "eval"):
            numbers = {name: float(value) for name, value in content.items() if isinstance(value, int | float)}
            for tracker in self._trackers:
                tracker.add(str(content["stage"]), kind, int(content["step"]), numbers)

    def info(self, text: str) -> None:
        """Record a sentence and show it."""
        self.log("info", text=text)
        if self.display != "off":
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        """Record a warning and show it, whatever the display setting."""
        self.log("warning", text=text)
        self.console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)

    def sync(self) -> None:
        """Flush the lines to disk; called before a checkpoint is written."""
        with saving(self.metrics_path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def rewind(self, stage: str, step: int, *, evaluated: bool = True) -> int:
        """Drop the lines of ``stage`` after ``step`` (-1: all), its result line, and truncated lines; returns how many.

        ``evaluated=False`` also drops the evaluation at ``step`` itself, because it will be repeated.
        """
        last = {"eval": step if evaluated else step - 1, "result": -1}
        self._file.close()
        kept, dropped = [], 0
        for text in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            line = _parse(text)
            if line is None or (line.get("stage") == stage and line.get("step", 0) > last.get(line["kind"], step)):
                dropped += 1
            else:
                kept.append(text + "\n")
        if dropped:
            write_text(self.metrics_path, "".join(kept))
        self._file = self._append()
        return dropped

    def write_environment(self, **more: Any) -> None:
        """Write ``environment.json``."""
        write_json(self.directory / "environment.json", environment(**more))

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe as ``recipe.yaml``."""
        write_text(self.directory / "recipe.yaml", text)

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Tracker]:
        """Show progress from ``start`` to ``total`` steps while the block runs."""
        title = f"{self.label}{title}"
        with show_progress(title, total, start, console=self.console, display=self.display) as tracker:
            yield tracker

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SilentLog(RunLog):
    """The log of a process that is not the main one: nothing is written or shown."""

    def __init__(self, directory: Path | str) -> None:
        self.directory, self.display, self.label = Path(directory), "off", ""
        self.console = Console(quiet=True)

    def log(self, kind: str, **content: Any) -> None:
        """No-op."""

    def info(self, text: str) -> None:
        """No-op."""

    def warning(self, text: str) -> None:
        """No-op."""

    def sync(self) -> None:
        """No-op."""

    def rewind(self, stage: str, step: int, *, evaluated: bool = True) -> int:
        """No-op; returns 0."""
        return 0

    def write_environment(self, **more: Any) -> None:
        """No-op."""

    def write_recipe(self, text: str) -> None:
        """No-op."""

    def close(self) -> None:
        """No-op."""


def _jsonable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item() if value.dim() == 0 else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value
