"""Code shared by all benchmarks: settings, sizes, targets, the record written as JSON, and its text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from trenchcoat.config import StudentConfig, UserError
from trenchcoat.runtime.runlog import environment
from trenchcoat.students import operator_of

RECORD_VERSION = 2
OPTIONS = (
    "only", "layers", "model", "teacher", "engine", "url", "contexts", "clients", "tokens", "dtype", "vllm_option",
)  # fmt: skip
"""Settings that a benchmark has only where its `options` name them."""


def _ignore(result: object) -> None:
    """The default for `keep` and `say`: do nothing."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run: the command line's options, and the callbacks for intermediate results."""

    device: str = "cpu"
    threads: int | None = None
    quick: bool = False
    repeats: int | None = None
    only: Sequence[str] = ()
    layers: int | None = None
    model: str | None = None
    teacher: str | None = None
    engine: str | None = None
    url: str | None = None
    contexts: Sequence[int] = ()
    clients: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    vllm_option: Sequence[str] = ()
    keep: Callable[[dict[str, Any]], None] = _ignore
    say: Callable[[str], None] = _ignore


@dataclass(frozen=True)
class Target:
    """A target for a figure: at least `wanted`, or at most.

    `figure` computes it from the measurements named in `of`, or from all of a benchmark's figures if `of` is empty.
    """

    what: str
    wanted: float
    figure: Callable[..., float | None]
    of: tuple[str, ...] = ()
    at_most: bool = False

    def judged(self, found: dict[str, Any], quick: bool = False) -> dict[str, Any]:
        """A row of the record: the measured figure and whether it meets the target, or why that is unknown."""
        rows = [found.get(name) for name in self.of] if self.of else [found]
        measured, met, why = None, None, "not measured"
        if any(row is not None and "out_of_memory" in row for row in rows):
            why = "out of memory"
        elif None not in rows:
            measured = self.figure(*rows)
        if measured is not None:
            met = measured <= self.wanted if self.at_most else measured >= self.wanted
            met, why = (None, "a quick run") if quick else (met, "")
        row = {"what": self.what, "wanted": self.wanted, "at_most": self.at_most}
        return {**row, "measured": measured, "met": met, "why": why}


def at_least(wanted: float, what: str, figure: Callable[..., float | None], *of: str) -> Target:
    """The target that `what` is `wanted` or more."""
    return Target(what, wanted, figure, of)


def at_most(wanted: float, what: str, figure: Callable[..., float | None], *of: str) -> Target:
    """The target that `what` is `wanted` or less."""
    return Target(what, wanted, figure, of, at_most=True)


def shown(value: object) -> str:
    """A number to four digits, anything else unchanged."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def listed(found: Mapping[str, Any]) -> str:
    """ "name value, name value" of a record that may be nested."""
    return ", ".join(
        f"{key} ({listed(value)})" if isinstance(value, Mapping) else f"{key} {shown(value)}"
        for key, value in found.items()
    )


def grid(first: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name -> figures as lines of aligned cells under the figures' names; ``first`` is the heading of the names."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [[first, *columns], *([name, *(shown(row.get(key, "")) for key in columns)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]


SizesT = TypeVar("SizesT")


class Benchmark(ABC, Generic[SizesT]):
    """One benchmark: what it measures at its `full` and `quick` sizes, and how its figures are printed."""

    full: SizesT
    quick: SizesT
    """Small sizes, for checking that it runs."""
    targets: tuple[Target, ...] = ()
    options: tuple[str, ...] = ()
    """The members of :data:`OPTIONS` that it supports."""
    implementation: str | None = "chunkwise"
    """Implementation of the operator; None: the students choose it by the device."""
    only_on: str | None = None
    """"cpu" or "cuda", if it runs on no other device."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def run(self, sizes: SizesT, settings: Settings) -> dict[str, Any]:
        """The figures, JSON-ready. A long benchmark calls `settings.keep` with the figures so far."""

    @abstractmethod
    def table(self, record: dict[str, Any]) -> list[str]:
        """The figures as lines of text; :meth:`text` adds the targets."""

    def draw(self, record: dict[str, Any], path: Path) -> bool:
        """Write the figures as a picture to ``path``; False for a benchmark that has none."""
        return False

    def sizes(self, settings: Settings) -> SizesT:
        """The sizes to measure; benchmarks that repeat have a field `repeats`."""
        sizes: Any = self.quick if settings.quick else self.full
        return sizes if settings.repeats is None else replace(sizes, repeats=settings.repeats)

    def judged(self, figures: dict[str, Any], quick: bool = False) -> list[dict[str, Any]]:
        """A row for each target."""
        return [target.judged(figures, quick) for target in self.targets]

    def needs(self, sizes: SizesT) -> str:
        """What it needs of a GPU, for the error message without one."""
        return ""

    def measure(self, settings: Settings) -> dict[str, Any]:
        """The record of a run.

        Raises:
            UserError: it cannot run on the device.
        """
        sizes = self.sizes(settings)
        self._refuse(settings.device, sizes)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        implementation = self.implementation or operator_of(
            StudentConfig(), head_dim=64, dtype=torch.float32, device=torch.device(settings.device)
        )
        machine = environment(implementation=implementation, device=settings.device)

        def record(figures: dict[str, Any]) -> dict[str, Any]:
            """The figures with everything else that goes into the file."""
            made = {"benchmark": self.name, "version": RECORD_VERSION, **figures}
            return {**made, "targets": self.judged(figures, settings.quick), "environment": machine}

        return record(self.run(sizes, replace(settings, keep=lambda figures: settings.keep(record(figures)))))

    def _refuse(self, device: str, sizes: SizesT) -> None:
        if self.only_on == "cpu" and device != "cpu":
            raise UserError(f"--device is {device}, but bench {self.name} runs on the CPU; use --device cpu")
        if self.only_on == "cuda" and not (device.startswith("cuda") and torch.cuda.is_available()):
            found = "no CUDA device was found" if device.startswith("cuda") else f"--device is {device}"
            raise UserError(
                f"bench {self.name} runs Triton kernels on a GPU, but {found}; run it on a machine with one, with "
                f"--device cuda{self.needs(sizes)} (`bench ops` measures on CPUs)"
            )

    def text(self, record: dict[str, Any]) -> str:
        """The record for the terminal."""
        rows = {
            row["what"]: {
                "measured": "-" if row["measured"] is None else row["measured"],
                "wanted": f"{'<=' if row['at_most'] else '>='} {row['wanted']:g}",
                "met": row["why"] or ("yes" if row["met"] else "NO"),
            }
            for row in record["targets"]
        }
        head = f"bench {self.name}, {record['environment']['threads']} threads"
        return "\n".join([head, *self.table(record), *(["", *grid("target", rows)] if rows else [])])
