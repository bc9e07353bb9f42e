"""`trenchcoat eval`: score a run, an adapter or a merged folder on text, or (`--tasks`) on tasks."""

from __future__ import annotations

import argparse
from typing import Any

from trenchcoat.cli.command import (
    DEVICE_HELP,
    TARGET_HELP,
    Command,
    add_overrides,
    output_file,
    path,
    values,
    whole_number,
)
from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import load_recipe, plain_recipe
from trenchcoat.evaluation.own_tasks import OWN_TASKS
from trenchcoat.evaluation.task import LENGTHS, TaskPlan


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN_OR_DIR", type=path, help=TARGET_HELP)
    add_overrides(parser)
    add = parser.add_argument_group("tasks", "with --tasks, these are scored instead of text").add_argument
    add("--tasks", type=_names, metavar="A,B", help=f"harness tasks; or {', '.join(OWN_TASKS)}")
    add("--num-fewshot", type=whole_number(0), metavar="N", help="examples (default: each task's)")
    add("--limit", type=whole_number(1), metavar="N", help="only the first N rows of each task")
    add("--batch-size", type=_batch, metavar="auto|N", help="rows per model call (auto)")
    add("--max-length", type=whole_number(1), metavar="N", help="cut contexts to N tokens, from the left (no cut)")
    add("--data-dir", type=path, metavar="DIR", help="folder with mmlu/ and commonsense/")
    add("--task-dir", type=path, metavar="DIR", help="your own task files (*.yaml)")
    add("--teacher", nargs="?", const="", metavar="DIR", help="also score the teacher (for a merged folder: DIR)")
    add("--out", type=output_file, metavar="FILE", help="results file (for a run: its tasks.json)")
    add("--device", default="auto", help=DEVICE_HELP)
    whole = "process every row in full, without reusing shared prefixes"
    add("--no-sharing", dest="share", action="store_false", help=whole)
    add("--probe-lengths", type=_lengths, metavar="X,Y", help="probe lengths, in training rows (0.5,1,2,4,8,16)")
    add("--probe-rows", type=whole_number(1), default=16, metavar="N", help="rows per length and depth (16)")
    add(
        "--trained-length",
        dest="trained",
        type=whole_number(1),
        metavar="N",
        help="length of a training row (data.seq_len)",
    )


def text_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of ``args.target``: a run's own, else the settings' defaults, with the embedded text."""
    if (args.target / "recipe.yaml").is_file():
        return load_recipe(args.target, args.overrides)
    return plain_recipe(args.overrides)


def _run(args: argparse.Namespace) -> Any:
    """Score a run, an adapter or a merged folder.

    Score a run again (with other eval.* settings, say) and write its report, or score an adapter or merged folder on
    the text named by data.path. With --tasks: benchmarks through lm-evaluation-harness (piqa, mmlu, ...; --data-dir for
    local files), and those that do not need it: MMLU by its four letters, and the long-context probes; also of any
    other model that Transformers opens.
    """
    if args.tasks is not None:
        return _score_tasks(args)
    from trenchcoat.conversion import stages

    if (args.target / "recipe.yaml").is_file():
        return stages.evaluate_run(args.recipe)
    return stages.evaluate_folder(args.target, args.recipe)


def _score_tasks(args: argparse.Namespace) -> Any:
    from trenchcoat.evaluation.tasks import evaluate_tasks

    names = ("tasks", "num_fewshot", "limit", "batch_size", "max_length", "task_dir", "data_dir", "teacher", "share")
    settings = values(args, *names, "device", "probe_rows", "trained")
    plan = TaskPlan(**settings, probe_lengths=args.probe_lengths or LENGTHS)
    return evaluate_tasks(args.target, plan, args.recipe, out=args.out)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task; expected names with commas between, e.g. piqa,mmlu")
    return names


def _batch(text: str) -> int | None:
    return None if text == "auto" else whole_number(1)(text)


def _lengths(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not all(0 < length < 1e6 for length in found):
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers above 0 with commas between, e.g. 0.5,1,2")
    return found


COMMAND = Command(
    _run,
    _options,
    recipe=text_recipe,
    sections=("data", "eval"),
    examples=(
        "eval runs/smollm2_135m eval.rows=64",
        "eval merged data.path=books.jsonl",
        "eval merged --tasks piqa,mmlu --limit 100 --teacher",
    ),
)
