"""`trenchcoat report`: any number of runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trenchcoat.cli.command import Command, output_folder, path


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folders, or files of eval --out")
    place = "folder of the comparison (report)"
    parser.add_argument("--out", type=output_folder, default=Path("report"), metavar="DIR", help=place)


def _run(args: argparse.Namespace) -> Any:
    """Any number of runs side by side.

    Put any number of runs side by side: losses and differences with 95 % intervals (row by row where the rows are the
    same), tasks, probes, one page of plots; as comparison.md and a self-contained comparison.html. With one run, write
    its report.md and report.html again.
    """
    from trenchcoat.evaluation.report import compare as compare_runs
    from trenchcoat.evaluation.report import run as report
    from trenchcoat.evaluation.results import RESULTS_FILE, Results

    runs = compare_runs.read_runs(args.runs)
    if len(runs) == 1 and (args.runs[0] / RESULTS_FILE).is_file():
        path = report.write_report(args.runs[0], Results.load(args.runs[0] / RESULTS_FILE))
        return (f"the report: {path} and {path.with_suffix('.html').name}",)
    path = compare_runs.write_comparison(runs, args.out)
    return compare_runs.terminal_comparison(runs), f"the comparison: {path} and {path.with_suffix('.html').name}"


COMMAND = Command(
    _run,
    _options,
    examples=("report runs/smollm2_135m runs/window_16 --out comparison",),
)
