"""``trenchcoat eval --tasks``: score a model and its teacher on tasks and probes, and write ``tasks.json``."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trenchcoat.config import ModelConfig, Recipe, UserError
from trenchcoat.data.load import load_batches
from trenchcoat.evaluation.loglikelihood import LoglikelihoodScorer
from trenchcoat.evaluation.own_tasks import OWN_TASKS
from trenchcoat.evaluation.report import run as report
from trenchcoat.evaluation.report.tasks import terminal_tables
from trenchcoat.evaluation.results import RESULTS_FILE, Outcome, Results
from trenchcoat.evaluation.task import EvalTask, ScoredModel, TaskPlan
from trenchcoat.evaluation.task_results import (
    FAR_OFF,
    MODEL_LABELS,
    STUDENT,
    TASKS_FILE,
    TEACHER,
    ProbeRecord,
    TaskResults,
)
from trenchcoat.models import hub
from trenchcoat.models.attach import set_far, set_mode, student_config, students_of
from trenchcoat.models.loading import load_model
from trenchcoat.models.lora import remove_lora
from trenchcoat.models.stage2 import holds_teacher
from trenchcoat.runtime.runlog import Tracker, environment, show_progress


def evaluate_tasks(target: Path, plan: TaskPlan, recipe: Recipe, *, out: Path | None = None) -> Outcome:
    """Score ``plan.tasks`` with the model in ``target``, a linearized one or any other causal language model that
    Transformers opens by itself; ``recipe`` names the text for the probes.

    Results are merged into ``out``, by default ``tasks.json`` of a run's folder, and the run's report is rewritten.
    Raises ``UserError`` for unknown tasks, missing files, and a missing harness.
    """
    others = [name for name in plan.tasks if name not in OWN_TASKS]
    if others and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks {','.join(others)} needs the evaluation harness: pip install lm-eval (these tasks "
            f"work without it: {', '.join(OWN_TASKS)})"
        )
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    is_run = (target / "recipe.yaml").is_file()
    plan = dataclasses.replace(plan, trained=plan.trained or _trained(plan, recipe if is_run else None))
    path = out if out is not None else target / TASKS_FILE if is_run else None
    if path is not None and path.is_file():
        TaskResults.load(path)  # fail on a damaged file before scoring, not after
    found = TaskResults(str(target), environment=environment())
    tasks = [OWN_TASKS[name] for name in plan.tasks if name in OWN_TASKS]
    if others:
        from trenchcoat.evaluation.harness import HarnessTasks

        tasks.insert(0, HarnessTasks(str(target), others))
    for name, model, tokenizer in _models(target, plan):
        if name == STUDENT and students_of(model):
            plan = dataclasses.replace(plan, window=student_config(model).window)
        for task in tasks:
            if (name != FAR_OFF or task.long_context) and (_is_first() or task.every_process):
                _score(found, task, name, model, tokenizer, plan, recipe)
    if not _is_first():
        return Outcome((), found)
    shown: list[Any] = terminal_tables(found)
    if path is None:
        return Outcome((*shown, "the results are not saved; give --out FILE to save them"), found)
    # read again: others may have written to it
    kept = TaskResults.load(path) if path.is_file() else TaskResults(found.model)
    kept.add(found)
    kept.save(path)
    shown.append(f"the results: {path}")
    if path == target / TASKS_FILE and (target / RESULTS_FILE).is_file():
        try:
            shown.append(f"the report: {report.write_report(target, Results.load(target / RESULTS_FILE))}")
        except UserError as error:  # of an older version; the tasks are scored and saved
            shown.append(f"the report was not written again: {error}")
    return Outcome(tuple(shown), found)


def _is_first() -> bool:
    """Whether this is the only process, or the first of several (the harness's data parallelism)."""
    return int(os.environ.get("RANK", "0")) == 0


def _long_context(plan: TaskPlan) -> list[str]:
    return [name for name in plan.tasks if name in OWN_TASKS and OWN_TASKS[name].long_context]


def _trained(plan: TaskPlan, recipe: Recipe | None) -> int | None:
    if recipe is not None:
        return recipe.data.seq_len
    asked = _long_context(plan)
    if asked:
        raise UserError(
            f"--tasks {','.join(asked)}: without a run's recipe the length of the training rows is unknown; give "
            "--trained-length N"
        )
    return None


def _models(target: Path, plan: TaskPlan) -> Iterator[tuple[str, Any, Any]]:
    """(name, model, tokenizer) of each model to score, one after the other, since they share weights."""
    device = _device(plan)
    if hub.is_ordinary(target):
        if plan.teacher == "":
            raise UserError(f"{target} is no linearized model, so it holds no teacher: give --teacher DIR")
        yield STUDENT, *load_model(ModelConfig(path=str(target), device=device))
        yield from _other_teacher(plan, device)
        return
    model, tokenizer = hub.load(target, device=device)
    if plan.teacher == "" and not holds_teacher(model):
        raise UserError(
            f"{target} is a merged folder (or one of lora.train=all), which no longer holds its teacher's weights: "
            "name the teacher's own folder (--teacher DIR), or score the run or adapter folder"
        )
    yield STUDENT, model, tokenizer
    if _long_context(plan):
        set_far(model, False)
        yield FAR_OFF, model, tokenizer
        set_far(model, True)
    if plan.teacher == "":
        remove_lora(model)
        set_mode(model, "teacher")
        yield TEACHER, model, tokenizer
    else:
        yield from _other_teacher(plan, device)


def _other_teacher(plan: TaskPlan, device: str) -> Iterator[tuple[str, Any, Any]]:
    """The teacher of a folder of its own, if there is one."""
    if plan.teacher:
        yield TEACHER, *load_model(ModelConfig(path=plan.teacher, device=device))


def _device(plan: TaskPlan) -> str:
    """With several processes on GPUs, each uses its own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and plan.device == "auto" and torch.cuda.is_available() else plan.device


def _score(
    found: TaskResults, task: EvalTask, name: str, model: Any, tokenizer: Any, plan: TaskPlan, recipe: Recipe
) -> None:
    """Add the scores of one model on one task, and what they cost, to ``found``."""
    began = time.monotonic()
    with _progress(f"{MODEL_LABELS[name]}: {task.name}") as progress:
        scorer = LoglikelihoodScorer(model, batch_size=plan.batch_size, share=plan.share, progress=progress)
        records = task.score(ScoredModel(name, scorer, tokenizer, partial(_held_out, recipe, tokenizer)), plan)
    cost = {
        "model": name,
        "tasks": task.name.split(","),
        "seconds": round(time.monotonic() - began, 1),
        **dataclasses.asdict(scorer.work),
        "beginnings_shared": scorer.share,
        **({} if scorer.share else {"not_shared_because": scorer.why_not}),
    }
    part = TaskResults(found.model, made=[cost], environment=found.environment)
    for key, record in records.items():
        if isinstance(record, ProbeRecord):
            part.probes[key] = record
        else:
            part.tasks[key] = record
    found.add(part)


def _held_out(recipe: Recipe, tokenizer: Any) -> list[int]:
    """Token ids of the recipe's validation rows, without padding."""
    data = dataclasses.replace(recipe.data, select="none", select_rows=None)  # selection applies to training rows only
    found: list[int] = []
    for batch in load_batches(data, tokenizer, batch_size=1, seed=0).validation():
        ids, mask = batch["input_ids"][0], batch.get("attention_mask")
        found += (ids if mask is None else ids[mask[0].bool()]).tolist()
    return found


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, opened when the number of requests is known, on the first process only."""
    tracker: Tracker | None = None
    known = 0
    with ExitStack() as shown:

        def update(done: int, total: int) -> None:
            """Show progress; a new total starts a new bar."""
            nonlocal tracker, known
            if not _is_first():
                return
            if tracker is None or total != known:
                shown.close()
                tracker, known = shown.enter_context(show_progress(title, total)), total
            tracker.update(done)

        yield update
