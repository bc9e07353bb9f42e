"""The grammar of ``eval --tasks``, ``report`` and ``lm-eval``, and from it to what they do."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trenchcoat.config import Recipe, UserError
from trenchcoat.config.recipe_io import load_recipe

REPORT = """\
Put any number of runs side by side: losses and differences with 95 % intervals (row by row where the rows are the
same), tasks, probes, one page of pictures; as comparison.md and a self-contained comparison.html. With one run, write
its report.md and report.html again.
"""
LM_EVAL = """\
The evaluation harness's own command line (lm_eval), which then knows `--model trenchcoat --model_args path=DIR`. All
arguments are the harness's; for several GPUs: accelerate launch -m trenchcoat.evaluation.harness, same arguments.
"""
OWN_TASKS = "mmlu_letters, needle, recall, copy"


@dataclass(frozen=True)
class Shown:
    """What a command leaves for the terminal."""

    shown: tuple[Any, ...]


def add_eval(sub: argparse.ArgumentParser) -> None:
    """Options of ``eval`` that score tasks instead of text."""
    tasks = sub.add_argument_group("tasks", "with --tasks, these are scored instead of text")
    tasks.add_argument("--tasks", type=_names, default=None, metavar="A,B", help=f"harness tasks; or {OWN_TASKS}")
    tasks.add_argument("--num-fewshot", type=_count, default=None, metavar="N", help="examples (default: each task's)")
    tasks.add_argument("--limit", type=_positive, default=None, metavar="N", help="only the first N rows of each task")
    tasks.add_argument("--batch-size", type=_batch, default=None, metavar="auto|N", help="rows of a call (auto)")
    tasks.add_argument(
        "--max-length",
        type=_positive,
        default=None,
        metavar="N",
        help="cut contexts to N tokens, from the left (no cut)",
    )
    tasks.add_argument("--data-dir", type=Path, default=None, metavar="DIR", help="folder with mmlu/ and commonsense/")
    tasks.add_argument("--task-dir", type=Path, default=None, metavar="DIR", help="your own task files (*.yaml)")
    tasks.add_argument(
        "--teacher", nargs="?", const="", default=None, metavar="DIR", help="the teacher too (of a merged folder: DIR)"
    )
    tasks.add_argument("--out", type=Path, default=None, metavar="FILE", help="results (a run's: its tasks.json)")
    tasks.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto)")
    tasks.add_argument(
        "--no-sharing", action="store_true", help="read every row whole, shared beginnings again and again"
    )
    tasks.add_argument(
        "--probe-lengths", type=_lengths, default=None, metavar="X,Y", help="in training rows (0.5,1,2,4,8,16)"
    )
    tasks.add_argument(
        "--probe-rows", type=_positive, default=16, metavar="N", help="rows of each length and depth (16)"
    )
    tasks.add_argument(
        "--trained-length", type=_positive, default=None, metavar="N", help="a training row (data.seq_len)"
    )


def add_report(sub: argparse.ArgumentParser) -> None:
    """Options of ``report``."""
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or files of eval --out")
    sub.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="where the comparison goes (report)"
    )


def run_tasks(args: argparse.Namespace, recipe: Recipe) -> Any:
    """``eval --tasks``."""
    from trenchcoat.evaluation.probes import LENGTHS
    from trenchcoat.evaluation.tasks import TaskPlan, evaluate_tasks

    plan = TaskPlan(
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        max_length=args.max_length,
        task_dir=args.task_dir,
        data_dir=args.data_dir,
        teacher=args.teacher,
        share=not args.no_sharing,
        device=args.device,
        probe_lengths=args.probe_lengths or LENGTHS,
        probe_rows=args.probe_rows,
        trained=args.trained_length,
    )
    return evaluate_tasks(Path(args.target), plan, recipe, out=args.out)


def run_report(args: argparse.Namespace) -> Shown:
    """``report``."""
    from trenchcoat.evaluation.report import compare as compare_runs
    from trenchcoat.evaluation.report import run as report
    from trenchcoat.evaluation.results import Results

    runs = compare_runs.read_runs(args.runs)
    if len(runs) == 1 and (args.runs[0] / report.RESULTS_FILE).is_file():
        path = report.write_report(args.runs[0], Results.load(args.runs[0] / report.RESULTS_FILE))
        return Shown((f"the report: {path} and {path.with_suffix('.html').name}",))
    path = compare_runs.write_comparison(runs, args.out)
    return Shown((compare_runs.terminal_table(runs), f"the comparison: {path} and {path.with_suffix('.html').name}"))


def run_lm_eval(arguments: list[str]) -> None:
    """``lm-eval ...``: hand over to the harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval needs the evaluation harness: pip install 'trenchcoat[eval]'")
    from trenchcoat.evaluation import harness

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        harness.main()
    finally:
        sys.argv = before


def text_recipe(target: str, overrides: list[str]) -> Recipe:
    """The recipe whose text is read for ``target``: a run's own, else the embedded text."""
    if (Path(target) / "recipe.yaml").is_file():
        return load_recipe(target, overrides)
    return load_recipe("demo", ["transfer=null", "lora=null", "data.path=embedded", *overrides])


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task; expected names with commas between, e.g. piqa,mmlu")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 0")
    return int(text)


def _batch(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _lengths(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(0 < length < 1e6 for length in found):
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers above 0 with commas between, e.g. 0.5,1,2")
    return found
