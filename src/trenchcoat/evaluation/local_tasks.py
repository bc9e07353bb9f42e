"""Benchmarks from files on this machine: MMLU's CSV files and multiple-choice JSONL files.

    DIR[/mmlu]/{dev,test}/SUBJECT_{dev,test}.csv     question, A, B, C, D, answer letter; no header
    DIR[/commonsense]/NAME.jsonl                     {"question": ..., "choices": [...], "label": index}

The task files in ``harness_tasks`` name functions of this module, so the harness's own command line can use them too.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, TypedDict

from trenchcoat.config import UserError

LETTERS = "ABCD"


class Item(TypedDict):
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
    """Subjects that have a test file, in order."""
    return sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))


def read_mmlu(folder: Path, subject: str, split: str) -> list[Item]:
    """The questions of ``split`` (``dev`` or ``test``). Raises ``UserError`` naming the line that is not MMLU's."""
    path = folder / split / f"{subject}_{split}.csv"
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected MMLU's CSV of subject {subject!r}, split {split!r}")
    items: list[Item] = []
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


def read_choices(path: Path) -> list[Item]:
    """Questions of a JSONL file. Raises ``UserError`` naming the line that has another form."""
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected lines of {{question, choices, label}}")
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            item: Item = {"question": row["question"], "choices": row["choices"], "label": row["label"]}
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


def winogrande_contexts(item: Item) -> list[str]:
    """The sentence up to the blank, with each option in it."""
    return [item["question"].split("_", 1)[0] + choice for choice in item["choices"]]


def winogrande_rest(item: Item) -> str:
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
