"""MMLU without the harness: the model's logits after the prompt, over the four letters alone.

The way of the benchmark's authors (https://arxiv.org/abs/2009.03300) and of LoLCATs' standalone evaluation: the
examples of dev in their order, then the question, and the letter with the largest logit is the answer. The prompt is
the harness's. Prompts longer than ``max_length`` tokens count as wrong, as there (2048).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trenchcoat.config import UserError
from trenchcoat.evaluation.local_tasks import LETTERS, Item, mmlu_folder, mmlu_subjects, read_mmlu
from trenchcoat.evaluation.loglikelihood import ContinuationScorer, Request
from trenchcoat.evaluation.task_results import ModelScore, TaskRecord, mean_estimate

NAME = "mmlu_letters"
ANSWER = "Answer:"


def score_letters(
    scorer: ContinuationScorer,
    tokenizer: Any,
    data_dir: Path | None,
    *,
    model_name: str,
    num_fewshot: int = 5,
    limit: int | None = None,
    max_length: int | None = None,
) -> dict[str, TaskRecord]:
    """Every subject, and all of them together under ``mmlu_letters``; records with the scores of this one model."""
    folder = mmlu_folder(data_dir)
    subjects = mmlu_subjects(folder)
    opening, letters = letter_tokens(tokenizer)
    prompts, items = _prompts(folder, subjects, num_fewshot, limit)
    encoded = tokenizer([text for texts in prompts.values() for text in texts])["input_ids"]
    contexts = [[*ids, *opening] for ids in encoded]
    fits = [max_length is None or len(ids) <= max_length for ids in contexts]
    kept = [ids for ids, fit in zip(contexts, fits, strict=True) if fit]
    answers = iter(scorer.scores([Request(ids, [letter]) for ids in kept for letter in letters]))
    settings = {"fewshot": num_fewshot, "limit": limit, "max_length": max_length, "data": "local"}
    records: dict[str, TaskRecord] = {}
    place = 0
    for subject, asked in items.items():
        rows, too_long = [], 0
        for item in asked:
            chosen = _choose([next(answers).logprob for _ in letters]) if fits[place] else None
            rows.append(float(chosen == item["label"]))
            too_long += not fits[place]
            place += 1
        identity = "".join(f"{text}{item['label']}" for text, item in zip(prompts[subject], asked, strict=True))
        records[f"{NAME}_{subject}"] = TaskRecord(
            name=f"{NAME}_{subject}",
            alias=subject.replace("_", " "),
            count=len(rows),
            rows_id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            settings=settings,
            scores={model_name: ModelScore({"acc": mean_estimate(rows)}, {"acc": rows}, too_long)},
        )
    members = [*records]
    every = [row for name in members for row in records[name].scores[model_name].rows["acc"]]
    whole = TaskRecord(
        name=NAME, alias=NAME, count=len(every), members=members,
        settings=settings,
        scores={model_name: ModelScore({"acc": mean_estimate(every)}, too_long=len(fits) - sum(fits))},
    )  # fmt: skip
    return {NAME: whole, **records}


def letter_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(tokens that all four answers begin with after the prompt, the last token of each answer).

    Raises ``UserError`` for a tokenizer whose answers do not end in four different tokens.
    """
    length = len(tokenizer(ANSWER)["input_ids"])
    answers = [tokenizer(f"{ANSWER} {letter}")["input_ids"][length:] for letter in LETTERS]
    letters = [ids[-1] if ids else -1 for ids in answers]
    if -1 in letters or len(set(letters)) < len(LETTERS):
        raise UserError(
            f"{NAME}: after {ANSWER!r} this tokenizer's answers A, B, C, D end in the tokens {letters}, which do not "
            "tell them apart; use the task mmlu, which scores answers of any length"
        )
    openings = {tuple(ids[:-1]) for ids in answers}
    return [*openings.pop()] if len(openings) == 1 else [], letters


def _choose(logprobs: Sequence[float]) -> int:
    return max(range(len(logprobs)), key=lambda i: logprobs[i])


def _prompts(
    folder: Path, subjects: Sequence[str], num_fewshot: int, limit: int | None
) -> tuple[dict[str, list[str]], dict[str, list[Item]]]:
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


def _ask(item: Item) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item["choices"], strict=True))
    return f"{item['question'].strip()}\n{choices}\n{ANSWER}"
