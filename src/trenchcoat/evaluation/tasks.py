"""``trenchcoat eval --tasks``: a model, and its teacher beside it, on tasks and probes; the file ``tasks.json``."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trenchcoat.config import ModelConfig, Recipe, UserError
from trenchcoat.data.load import load_batches
from trenchcoat.evaluation.loglikelihood import LoglikelihoodScorer, ScoringCost
from trenchcoat.evaluation.mmlu import MMLU_LETTERS, score_mmlu
from trenchcoat.evaluation.probes import LENGTHS, PROBES, Haystack, corpus_tokens, probe
from trenchcoat.evaluation.report import run as report
from trenchcoat.evaluation.report.tasks import TASKS_FILE, terminal_tables
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.task_results import FAR_OFF, MODEL_LABELS, STUDENT, TEACHER, ProbeRecord, TaskResults
from trenchcoat.models import hub
from trenchcoat.models.attach import set_far, set_mode
from trenchcoat.models.loading import load_model
from trenchcoat.models.lora import remove_lora
from trenchcoat.runtime.runlog import Tracker, environment, show_progress


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What to score."""

    tasks: tuple[str, ...]
    """``mmlu_letters``, probes, or names of the harness's tasks."""
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    """Rows of a call; None: chosen."""
    max_length: int | None = None
    task_dir: Path | None = None
    data_dir: Path | None = None
    teacher: str | None = None
    """Score the teacher too: an empty text for the run's or adapter's base, or where the teacher is."""
    share: bool = True
    """Read shared beginnings once."""
    device: str = "auto"
    probe_lengths: tuple[float, ...] = LENGTHS
    probe_rows: int = 16
    trained: int | None = None
    """Length of a training row, where no recipe says it."""


@dataclass(frozen=True)
class TaskOutcome:
    """What the command leaves for the terminal."""

    shown: tuple[Any, ...]
    results: TaskResults


def evaluate_tasks(target: Path, plan: TaskPlan, recipe: Recipe, *, out: Path | None = None) -> TaskOutcome:
    """Score ``plan.tasks`` with the model in ``target``; ``recipe`` names the text that probes are made of.

    Results join those in ``out``, by default ``tasks.json`` of a run's folder, whose report is written again. Raises
    ``UserError`` for unknown tasks, missing files, and a harness that is not installed.
    """
    own = [name for name in plan.tasks if name == MMLU_LETTERS or name in PROBES]
    others = [name for name in plan.tasks if name not in own]
    if others and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks {','.join(others)} needs the evaluation harness: pip install 'trenchcoat[eval]' (without it "
            f"there are {MMLU_LETTERS}, {', '.join(PROBES)})"
        )
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    is_run = (target / "recipe.yaml").is_file()
    plan = dataclasses.replace(plan, trained=plan.trained or _trained(plan, recipe if is_run else None))
    path = out if out is not None else target / TASKS_FILE if is_run else None
    if path is not None and path.is_file():
        TaskResults.load(path)  # a damaged file is an error before the work, not after it
    found = TaskResults(str(target), environment=environment())
    for name, model, tokenizer in _models(target, plan):
        _score_harness(found, name, model, tokenizer, others, plan)
        _score_own(found, name, model, tokenizer, own, plan, recipe)
    if int(os.environ.get("RANK", "0")) > 0:
        return TaskOutcome((), found)
    shown: list[Any] = terminal_tables(found)
    if path is None:
        return TaskOutcome((*shown, "not kept; give --out FILE to keep them"), found)
    kept = TaskResults.load(path) if path.is_file() else TaskResults(found.model)  # as it is now: others may write too
    kept.add(found)
    kept.save(path)
    shown.append(f"the results: {path}")
    if path == target / TASKS_FILE and (target / report.RESULTS_FILE).is_file():
        written = report.write_report(target, Results.load(target / report.RESULTS_FILE))
        shown.append(f"the report, with them: {written}")
    return TaskOutcome(tuple(shown), found)


def _trained(plan: TaskPlan, recipe: Recipe | None) -> int | None:
    if recipe is not None:
        return recipe.data.seq_len
    asked = [name for name in plan.tasks if name in PROBES]
    if asked:
        raise UserError(
            f"--tasks {','.join(asked)}: only a run's recipe says how long the training rows were; give "
            "--trained-length N"
        )
    return None


def _models(target: Path, plan: TaskPlan) -> Iterator[tuple[str, Any, Any]]:
    """(name, model ready to be scored, tokenizer) of each model, one after the other: they share weights."""
    device = _device(plan)
    model, tokenizer = hub.load(target, device=device)
    if plan.teacher == "" and not hasattr(model, "trenchcoat_adapter"):
        raise UserError(
            f"{target} is a merged folder, which no longer holds its teacher's weights: name the teacher's own folder "
            "(--teacher DIR), or score the run or adapter folder"
        )
    yield STUDENT, model, tokenizer
    if any(name in PROBES for name in plan.tasks):
        set_far(model, False)
        yield FAR_OFF, model, tokenizer
        set_far(model, True)
    if plan.teacher == "":
        remove_lora(model)
        set_mode(model, "teacher")
        yield TEACHER, model, tokenizer
    elif plan.teacher is not None:
        model, tokenizer = load_model(ModelConfig(path=plan.teacher, device=device))
        yield TEACHER, model, tokenizer


def _device(plan: TaskPlan) -> str:
    """Of several processes on GPUs each takes its own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and plan.device == "auto" and torch.cuda.is_available() else plan.device


def _score_harness(found: TaskResults, name: str, model: Any, tokenizer: Any, tasks: list[str], plan: TaskPlan) -> None:
    if not tasks or name == FAR_OFF:
        return
    from trenchcoat.evaluation import harness

    began = time.monotonic()
    with _Bar(f"{MODEL_LABELS[name]}: {','.join(tasks)}") as bar:
        lm = harness.TrenchcoatLM(
            str(found.model),
            model=model,
            tokenizer=tokenizer,
            batch_size=plan.batch_size or "auto",
            max_length=plan.max_length,
            share=plan.share,
            progress=bar,
        )
        records, work = harness.score_tasks(
            lm,
            tasks,
            model_name=name,
            num_fewshot=plan.num_fewshot,
            limit=plan.limit,
            task_dir=plan.task_dir,
            data_dir=plan.data_dir,
        )
    made = _made(name, tasks, began, work, lm.scorer)
    found.add(TaskResults(found.model, tasks=records, made=[made], environment=found.environment))


def _score_own(
    found: TaskResults, name: str, model: Any, tokenizer: Any, tasks: list[str], plan: TaskPlan, recipe: Recipe
) -> None:
    """Letters and probes: of several processes the first one scores them."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    for task in tasks:
        if task == MMLU_LETTERS and name == FAR_OFF:
            continue
        began = time.monotonic()
        with _Bar(f"{MODEL_LABELS[name]}: {task}") as bar:
            scorer = LoglikelihoodScorer(model, batch_size=plan.batch_size, share=plan.share, progress=bar)
            if task == MMLU_LETTERS:
                fewshot = 5 if plan.num_fewshot is None else plan.num_fewshot
                records = score_mmlu(
                    scorer,
                    tokenizer,
                    plan.data_dir,
                    model_name=name,
                    num_fewshot=fewshot,
                    limit=plan.limit,
                    max_length=plan.max_length,
                )
                part = TaskResults(found.model, tasks=records, environment=found.environment)
            else:
                record = _probe(task, scorer, tokenizer, plan, recipe, name)
                part = TaskResults(found.model, probes={task: record}, environment=found.environment)
        part.made.append(_made(name, [task], began, scorer.work, scorer))
        found.add(part)


def _probe(
    task: str, scorer: LoglikelihoodScorer, tokenizer: Any, plan: TaskPlan, recipe: Recipe, name: str
) -> ProbeRecord:
    assert plan.trained is not None, "settled before a probe is made"
    data = dataclasses.replace(recipe.data, select="none", select_rows=None)  # of training rows, which it needs not
    rows = [ids for batch in load_batches(data, tokenizer, batch_size=1, seed=0).validation() for ids in _ids(batch)]
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    hay = Haystack(corpus_tokens(rows, tokenizer), opening, round(plan.trained * max(plan.probe_lengths)))
    return probe(
        task, scorer, hay, trained=plan.trained, lengths=plan.probe_lengths, rows=plan.probe_rows, model_name=name
    )


def _ids(batch: Mapping[str, Any]) -> list[int]:
    ids, mask = batch["input_ids"][0], batch.get("attention_mask")
    kept = ids if mask is None else ids[mask[0].bool()]
    return [int(token) for token in kept]


class _Bar:
    """Progress that opens with the first answers, when their number is known; of several processes one shows it."""

    def __init__(self, title: str) -> None:
        self.title, self.total = title, 0
        self.open = ExitStack()
        self.tracker: Tracker | None = None

    def __call__(self, done: int, total: int) -> None:
        if int(os.environ.get("RANK", "0")) > 0:
            return
        if self.tracker is None or total != self.total:
            self.open.close()
            self.tracker, self.total = self.open.enter_context(show_progress(self.title, total)), total
        self.tracker.update(done)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.open.close()


def _made(
    name: str, tasks: Sequence[str], began: float, work: ScoringCost, scorer: LoglikelihoodScorer
) -> dict[str, Any]:
    """What it cost, for the record."""
    return {
        "model": name,
        "tasks": list(tasks),
        "seconds": round(time.monotonic() - began, 1),
        **dataclasses.asdict(work),
        "beginnings_shared": scorer.share,
        **({} if scorer.share else {"not_shared_because": scorer.why_not}),
    }
