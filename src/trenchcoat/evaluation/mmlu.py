"""Benchmarks from local files, and MMLU scored without the harness.

    DIR[/mmlu]/{dev,test}/SUBJECT_{dev,test}.csv     question, A, B, C, D, answer letter; no header
    DIR[/commonsense]/NAME.jsonl                     {"question": ..., "choices": [...], "label": index}

The task files in ``harness_tasks`` refer to functions of this module, so the harness's command line can use them too.

``mmlu_letters`` is MMLU as its authors (https://arxiv.org/abs/2009.03300) and LoLCATs' standalone evaluation score it:
the examples of dev in their order, then the question, and the letter with the largest logit is the answer. The prompt
is the harness's. Prompts longer than ``max_length`` tokens count as wrong, as in theirs (2048).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from trenchcoat.config import UserError
from trenchcoat.evaluation.task import EvalTask, ScoredModel, TaskPlan
from trenchcoat.models.text import tokenize

if TYPE_CHECKING:
    from trenchcoat.evaluation.task_results import TaskRecord

MMLU_LETTERS = "mmlu_letters"
"""The task's name on the command line and in the results."""
LETTERS = "ABCD"
_PROMPT_END = "Answer:"


class ChoiceItem(TypedDict):
    """One multiple-choice question."""

    question: str
    choices: list[str]
    label: int
    """Index of the right choice."""


def task_folder() -> Path:
    """Where the harness's task files for these formats are."""
    return Path(__file__).parent / "harness_tasks"


def mmlu_folder(data_dir: Path | str | None) -> Path:
    """The folder of MMLU's ``dev`` and ``test`` under ``data_dir``. Raises ``UserError`` when there is none."""
    root = _root(data_dir)
    for folder in (root / "mmlu", root):
        if (folder / "test").is_dir():
            return folder
    raise UserError(f"--data-dir {root}: no MMLU there; expected mmlu/test/SUBJECT_test.csv (and mmlu/dev) inside it")


def mmlu_subjects(folder: Path) -> list[str]:
    """Subjects that have a test file, sorted."""
    return sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))


def read_mmlu(folder: Path, subject: str, split: str) -> list[ChoiceItem]:
    """The questions of ``split`` (``dev`` or ``test``). Raises ``UserError`` naming a malformed line."""
    path = folder / split / f"{subject}_{split}.csv"
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected MMLU's CSV of subject {subject!r}, split {split!r}")
    items: list[ChoiceItem] = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if len(row) != 6 or row[5] not in LETTERS or len(row[5]) != 1:
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} columns ending in {row[-1:]}; expected question, "
                        "A, B, C, D and the answer's letter"
                    )
                items.append({"question": row[0], "choices": row[1:5], "label": LETTERS.index(row[5])})
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a readable CSV file in UTF-8: {error}") from error
    if not items:
        raise UserError(f"{path} is empty; expected MMLU's questions")
    return items


def read_choices(path: Path) -> list[ChoiceItem]:
    """Questions of a JSONL file. Raises ``UserError`` naming a malformed line."""
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected lines of {{question, choices, label}}")
    items: list[ChoiceItem] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            item: ChoiceItem = {"question": row["question"], "choices": row["choices"], "label": row["label"]}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: {type(error).__name__} {error}; expected {{question, choices, label}}"
            ) from error
        label, choices = item["label"], item["choices"]
        if not isinstance(label, int) or not isinstance(choices, list) or not 0 <= label < len(choices):
            raise UserError(f"{path}, line {number}: label {label!r} is not the index of one of the choices")
        items.append(item)
    if not items:
        raise UserError(f"{path} is empty; expected lines of {{question, choices, label}}")
    return items


def mmlu_dataset(subject: str, data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """The harness's data set of one subject: splits ``dev`` and ``test``."""
    from datasets import Dataset

    folder = mmlu_folder(data_dir)
    return {split: Dataset.from_list([*read_mmlu(folder, subject, split)]) for split in ("dev", "test")}


def commonsense_dataset(file: str, data_dir: str | None = None, **_: Any) -> dict[str, Any]:
    """The harness's data set of one JSONL file: split ``test``."""
    from datasets import Dataset

    root = _root(data_dir)
    found = next((path for path in (root / "commonsense" / file, root / file) if path.is_file()), None)
    if found is None:
        raise UserError(f"--data-dir {root}: no {file} there; expected commonsense/{file} inside it")
    return {"test": Dataset.from_list([*read_choices(found)])}


def winogrande_contexts(item: ChoiceItem) -> list[str]:
    """The sentence up to the blank, with each option in it."""
    return [item["question"].split("_", 1)[0] + choice for choice in item["choices"]]


def winogrande_rest(item: ChoiceItem) -> str:
    """The sentence after the blank."""
    before, blank, rest = item["question"].partition("_")
    if not blank:
        raise UserError(f"the WinoGrande question {before[:60]!r} has no blank; expected one '_' in it")
    return rest.strip()


def _root(data_dir: Path | str | None) -> Path:
    if data_dir is None:
        raise UserError(
            "these tasks read local files: give their folder with --data-dir (lm_eval: --metadata data_dir=DIR)"
        )
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder; expected one with mmlu/ or commonsense/ inside")
    return root


class MmluLetters(EvalTask):
    """Every subject of MMLU, and their total as ``mmlu_letters``."""

    name = MMLU_LETTERS
    description = "MMLU from local files: the largest of the four letters' logits is the answer"

    def score(self, model: ScoredModel, plan: TaskPlan) -> Mapping[str, TaskRecord]:
        """Records with this model's scores."""
        from trenchcoat.evaluation.statistics import mean_estimate
        from trenchcoat.evaluation.task_results import ModelScore, TaskRecord

        fewshot = 5 if plan.num_fewshot is None else plan.num_fewshot
        opening, letters = letter_tokens(model.tokenizer)
        prompts, items = _prompts(mmlu_folder(plan.data_dir), fewshot, plan.limit)
        encoded = tokenize(model.tokenizer, [text for texts in prompts.values() for text in texts])["input_ids"]
        contexts = [[*ids, *opening] for ids in encoded]
        fits = [plan.max_length is None or len(ids) <= plan.max_length for ids in contexts]
        kept = [ids for ids, fit in zip(contexts, fits, strict=True) if fit]
        answers = iter(model.scorer.scores([(ids, [letter]) for ids in kept for letter in letters]))
        settings = {"fewshot": fewshot, "limit": plan.limit, "max_length": plan.max_length, "data": "local"}
        records: dict[str, TaskRecord] = {}
        every: list[float] = []
        for subject, asked in items.items():
            here = slice(len(every), len(every) + len(asked))
            fit_here = fits[here]
            read = [ids for ids, fit in zip(contexts[here], fit_here, strict=True) if fit]
            chosen = [_largest([next(answers).logprob for _ in letters]) if fit else None for fit in fit_here]
            rows = [float(choice == item["label"]) for choice, item in zip(chosen, asked, strict=True)]
            every += rows
            identity = "".join(f"{text}{item['label']}" for text, item in zip(prompts[subject], asked, strict=True))
            records[f"{self.name}_{subject}"] = TaskRecord(
                name=f"{self.name}_{subject}",
                alias=subject.replace("_", " "),
                count=len(rows),
                rows_id=hashlib.sha256(identity.encode()).hexdigest()[:16],
                settings=settings,
                scores={model.name: ModelScore({"acc": mean_estimate(rows)}, {"acc": rows}, fit_here.count(False))},
                past_2w=plan.past_2w((ids, [0]) for ids in read),
            )
        whole = TaskRecord(
            self.name, self.name, len(every), members=[*records], settings=settings,
            scores={model.name: ModelScore({"acc": mean_estimate(every)}, too_long=fits.count(False))},
            past_2w=plan.past_2w((ids, [0]) for ids in kept),
        )  # fmt: skip
        return {self.name: whole, **records}


def letter_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(tokens that all four answers start with, last token of each answer).

    Raises ``UserError`` for a tokenizer whose four answers do not end in different tokens.
    """
    length = len(tokenizer(_PROMPT_END)["input_ids"])
    answers = [tokenizer(f"{_PROMPT_END} {letter}")["input_ids"][length:] for letter in LETTERS]
    letters = [ids[-1] if ids else -1 for ids in answers]
    if -1 in letters or len(set(letters)) < len(LETTERS):
        raise UserError(
            f"{MMLU_LETTERS}: after {_PROMPT_END!r} this tokenizer's answers A, B, C, D end in the tokens {letters}, "
            "which are not four different ones; use the task mmlu, which scores answers of any length"
        )
    openings = {tuple(ids[:-1]) for ids in answers}
    return [*openings.pop()] if len(openings) == 1 else [], letters


def _largest(logprobs: Sequence[float]) -> int:
    return max(range(len(logprobs)), key=lambda i: logprobs[i])


def _prompts(
    folder: Path, num_fewshot: int, limit: int | None
) -> tuple[dict[str, list[str]], dict[str, list[ChoiceItem]]]:
    """(prompts, questions) of every subject."""
    subjects = mmlu_subjects(folder)
    if not subjects:
        raise UserError(f"{folder / 'test'} holds no SUBJECT_test.csv; expected MMLU's files")
    prompts, items = {}, {}
    for subject in subjects:
        examples = read_mmlu(folder, subject, "dev") if num_fewshot else []
        if len(examples) < num_fewshot:
            raise UserError(
                f"--num-fewshot {num_fewshot}: {folder}/dev has {len(examples)} examples of {subject!r}; ask for fewer"
            )
        opening = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        shown = "".join(f"{_ask(item)} {LETTERS[item['label']]}\n\n" for item in examples[:num_fewshot])
        items[subject] = read_mmlu(folder, subject, "test")[:limit]
        prompts[subject] = [opening + shown + _ask(item) for item in items[subject]]
    return prompts, items


def _ask(item: ChoiceItem) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item["choices"], strict=True))
    return f"{item['question'].strip()}\n{choices}\n{_PROMPT_END}"
