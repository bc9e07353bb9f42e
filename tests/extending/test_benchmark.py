"""A new benchmark is one class and one line in BENCHMARKS: the command line lists it, runs it and writes its record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trenchcoat.bench.benchmark import Benchmark, Settings, at_least, grid
from trenchcoat.bench.registry import BENCHMARKS
from trenchcoat.bench.timing import seconds
from trenchcoat.cli.app import main


@dataclass(frozen=True)
class SortSizes:
    """The measurements."""

    numbers: tuple[int, ...] = (1000, 100_000)
    repeats: int = 3


class SortBenchmark(Benchmark[SortSizes]):
    """``bench sort``: sorting against finding the maximum."""

    full = SortSizes()
    quick = SortSizes(numbers=(100,), repeats=1)
    targets = (
        at_least(1.0, "sorting over finding the largest", lambda found: found["seconds"]["100"]["sort"]["wall"] * 1e9),
    )

    def run(self, sizes: SortSizes, settings: Settings) -> dict[str, Any]:
        """Measure both for each length."""
        found = {}
        for count in sizes.numbers:
            x = torch.rand(count, device=settings.device)
            found[str(count)] = seconds({"sort": x.sort, "max": x.max}, sizes.repeats, settings.device)
        return {"seconds": found}

    def table(self, record: dict[str, Any]) -> list[str]:
        """One row per length."""
        rows = record["seconds"].items()
        return grid("numbers", {count: {name: c["wall"] for name, c in row.items()} for count, row in rows})


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    BENCHMARKS["sort"] = (f"{__name__}:SortBenchmark", "sorting on this machine")
    yield
    del BENCHMARKS["sort"]


def test_the_command_line_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sort.json"
    assert main(["bench", "sort", "--quick", "--out", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["benchmark"] == "sort"
    assert record["seconds"]["100"]["sort"]["wall"] > 0
    assert record["targets"][0]["why"] == "a quick run"
    assert record["environment"]["device"] == "cpu"
    text = capsys.readouterr().out
    assert text.startswith("bench sort")
    assert f"{record['seconds']['100']['max']['wall']:.4g}" in text


def test_help_lists_it_and_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "sort" in capsys.readouterr().out
    assert main(["bench", "sort", "--only", "model"]) == 2
    assert "bench sort does not have --only" in capsys.readouterr().err
