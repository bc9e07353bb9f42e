"""The evaluation harness with linearized models: its scores, local files, one process and several."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from tasks_kit import TOLERANCE, model_of
from trenchcoat.cli import app as cli
from trenchcoat.config import UserError
from trenchcoat.evaluation import harness, loglikelihood
from trenchcoat.evaluation.harness import TrenchcoatLM, score_tasks
from trenchcoat.evaluation.mmlu import MmluLetters, letter_tokens, read_choices, read_mmlu, winogrande_rest
from trenchcoat.evaluation.report.tasks import past_2w_note
from trenchcoat.evaluation.task import ScoredModel, TaskPlan
from trenchcoat.evaluation.task_results import STUDENT, TaskResults, paired, pooled_rows
from trenchcoat.models.attach import set_mode
from trenchcoat.models.hub import save_merged


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(loglikelihood.LEAST_SAVED, "cpu", 10)
    logger = logging.getLogger("lm_eval")
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
    # its command line adds a handler that writes to this test's captured stream, which is closed afterwards
    logger.handlers[:], logger.propagate = handlers, propagate
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)


@pytest.fixture(scope="module")
def student(tiny_model_dir: Path) -> Any:
    return model_of(tiny_model_dir)


def test_the_model_is_registered_with_the_harness() -> None:
    assert get_model("trenchcoat") is TrenchcoatLM


@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_likelihoods_equal_those_of_the_harness_model(mode: Any, student: Any, tokenizer: Any, data_dir: Path) -> None:
    """The same tasks through HFLM, which reads every row whole."""
    set_mode(student, mode)
    names = ["mmlu", "piqa", "winogrande", "hellaswag"]
    ours = TrenchcoatLM(model=student, tokenizer=tokenizer)
    theirs = HFLM(pretrained=student, tokenizer=tokenizer, batch_size=2, max_length=100_000)
    plan = TaskPlan(tasks=(), num_fewshot=3, limit=2, data_dir=data_dir)
    found = score_tasks(ours, names, plan, model_name=STUDENT)
    work = ours.scorer.work
    theirs._max_length = 100_000
    expected = score_tasks(theirs, names, plan, model_name=STUDENT)  # type: ignore[arg-type]
    set_mode(student, "student")
    assert set(found) == set(expected) >= {"mmlu", "mmlu_stem", "mmlu_anatomy", "piqa"}
    for name, record in found.items():
        assert record.scores == expected[name].scores, name
        assert record.rows_id == expected[name].rows_id
    assert work.beginnings >= 57
    assert work.tokens_read < 0.7 * work.tokens_given  # two questions per prefix
    assert found["mmlu"].count == 57 * 2
    assert len(found["mmlu"].members) == 57
    assert found["mmlu_humanities"].count == 13 * 2
    assert found["mmlu_anatomy"].settings["fewshot"] == found["mmlu"].settings["fewshot"] == 3
    assert found["mmlu_anatomy"].settings["harness"]


@pytest.mark.parametrize("max_length", [50, 300])
def test_max_length_truncates_like_the_harness(max_length: int, student: Any, tokenizer: Any, data_dir: Path) -> None:
    requests = [((f"{i}", "x"), [3 + i] * (20 * i + 1), [5 + i, 6]) for i in range(1, 9)]
    ours = TrenchcoatLM(model=student, tokenizer=tokenizer, max_length=max_length)
    theirs = HFLM(pretrained=student, tokenizer=tokenizer, batch_size=3, max_length=max_length)
    found, expected = (lm._loglikelihood_tokens(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=TOLERANCE)
    with pytest.raises(UserError, match="does not fit max_length=50"):
        TrenchcoatLM(model=student, tokenizer=tokenizer, max_length=50)._cut([1], range(51))


def test_rows_are_compared_one_by_one(student: Any, tokenizer: Any, data_dir: Path) -> None:
    lm = TrenchcoatLM(model=student, tokenizer=tokenizer)
    plan = TaskPlan(tasks=(), limit=2, data_dir=data_dir)
    records = score_tasks(lm, ["mmlu", "piqa"], plan, model_name=STUDENT)
    results = TaskResults("x", tasks=records)
    assert results.tasks["mmlu"].count == 114
    identity, rows = pooled_rows(results, "mmlu", STUDENT, "acc")
    assert len(rows) == 114
    assert len(identity.split()) == 57
    assert sum(rows) / 114 == pytest.approx(results.tasks["mmlu"].scores[STUDENT].metrics["acc"].value)
    gap = paired(results, results, "mmlu", "acc", (STUDENT, STUDENT))
    assert gap is not None
    assert (gap.value, gap.error) == (0, 0)
    others = score_tasks(lm, ["mmlu"], dataclasses.replace(plan, num_fewshot=1), model_name=STUDENT)
    assert paired(results, TaskResults("y", tasks=others), "mmlu", "acc", (STUDENT, STUDENT)) is None


def test_the_share_of_scored_tokens_past_2w(student: Any, tokenizer: Any, data_dir: Path) -> None:
    plan = TaskPlan(tasks=(), limit=2, data_dir=data_dir, window=2)
    assert plan.past_2w([([0] * 3, [1, 2, 3]), ([0] * 9, [1]), ([0], [1])]) == (2, 5)
    assert dataclasses.replace(plan, window=None).past_2w([([0], [1])]) is None
    lm = TrenchcoatLM(model=student, tokenizer=tokenizer)
    records = score_tasks(lm, ["piqa"], plan, model_name=STUDENT)
    asked = list(lm.asked.values())
    assert len(asked) == 4
    wanted = sum(len(one.context) + i > 4 for one in asked for i in range(len(one.continuation)))
    assert records["piqa"].past_2w == (wanted, sum(len(one.continuation) for one in asked))
    assert past_2w_note(TaskResults("x", tasks=records)) == ""
    records["piqa"].past_2w = (1, 100)
    assert "scored in piqa, fewer than 5% lie past 2W" in past_2w_note(TaskResults("x", tasks=records))


def test_mmlu_letters(student: Any, tokenizer: Any, data_dir: Path) -> None:
    """Compare with the logits at the end of the whole prompt."""
    scorer = loglikelihood.LoglikelihoodScorer(student)
    subject_model = ScoredModel(STUDENT, scorer, tokenizer, list)
    plan = TaskPlan(tasks=("mmlu_letters",), data_dir=data_dir, num_fewshot=2)
    records = MmluLetters().score(subject_model, plan)
    opening, letters = letter_tokens(tokenizer)
    folder = data_dir / "mmlu"
    for subject in ("anatomy", "astronomy"):
        beginning = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        expected = []
        shots = read_mmlu(folder, subject, "dev")[:2]
        for item in read_mmlu(folder, subject, "test"):
            text = beginning
            for one in [*shots, item]:
                choices = "".join(
                    f"{letter}. {choice}\n" for letter, choice in zip("ABCD", one["choices"], strict=True)
                )
                text += f"{one['question']}\n{choices}Answer:"
                text += "" if one is item else f" {'ABCD'[one['label']]}\n\n"
            ids = tokenizer(text, return_tensors="pt").input_ids[0].tolist() + opening
            logits = student(torch_row(ids), use_cache=False).logits[0, -1, letters]
            expected.append(float(int(logits.argmax()) == item["label"]))
        assert records[f"mmlu_letters_{subject}"].scores[STUDENT].rows["acc"] == expected
    assert records["mmlu_letters"].count == 57 * 3
    assert scorer.work.beginnings == 57
    short = MmluLetters().score(subject_model, dataclasses.replace(plan, max_length=10))
    assert short["mmlu_letters"].scores[STUDENT].metrics["acc"].value == 0
    assert short["mmlu_letters"].scores[STUDENT].too_long == 57 * 3


def torch_row(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def test_answers_that_end_in_the_same_token_are_refused(data_dir: Path) -> None:
    class Blind:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1] * len(text.split())}

    with pytest.raises(UserError, match="not four different ones"):
        letter_tokens(Blind())


def test_users_task_files(student: Any, tokenizer: Any, data_dir: Path, tmp_path: Path) -> None:
    rows = data_dir / "commonsense" / "piqa_valid.jsonl"
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {rows}}}\n  cache_dir: {tmp_path}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: label\n"
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    lm = TrenchcoatLM(model=student, tokenizer=tokenizer)
    records = score_tasks(lm, ["mine"], TaskPlan(tasks=(), task_dir=tmp_path), model_name=STUDENT)
    assert records["mine"].count == 5
    assert len(records["mine"].scores[STUDENT].rows["acc"]) == 5


def test_mistakes_are_explained(student: Any, tokenizer: Any, data_dir: Path, tmp_path: Path) -> None:
    def fails(names: list[str], **more: Any) -> str:
        lm = TrenchcoatLM(model=student, tokenizer=tokenizer)
        with pytest.raises(UserError) as error:
            score_tasks(lm, names, TaskPlan(tasks=(), **more), model_name=STUDENT)
        return str(error.value)

    assert "did you mean" in fails(["winogrand"], data_dir=data_dir)
    assert "is not a folder" in fails(["mmlu"], data_dir=tmp_path / "absent")
    assert "no MMLU there" in fails(["mmlu"], data_dir=tmp_path)
    assert "no piqa_valid.jsonl" in fails(["piqa"], data_dir=tmp_path)
    assert "no task file" in fails(["mine"], task_dir=tmp_path)
    with pytest.raises(UserError, match="--model_args has pth"):
        TrenchcoatLM(pth="x")
    with pytest.raises(UserError, match="path=DIR"):
        TrenchcoatLM()
    with pytest.raises(UserError, match="merged folder"):
        harness.become_teacher(student)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n", "line 1: 2 columns"), ("q,1,2,3,4,E\n", "line 1"), ("", "is empty"), ("\xff\xfe", "not a readable CSV")],
)
def test_a_bad_csv_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "anatomy_test.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_mmlu(tmp_path, "anatomy", "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "x"', "line 1"),
        ('{"question": "x", "choices": ["a"]}', "label"),
        ('\n{"question": "x", "choices": ["a"], "label": 1}', "line 2: label 1"),
        ("[1]", "line 1"),
        ("", "is empty"),
    ],
)
def test_a_bad_jsonl_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_choices(path)
    with pytest.raises(UserError, match="no blank"):
        winogrande_rest({"question": "no gap", "choices": ["a", "b"], "label": 0})


@pytest.fixture(scope="module")
def merged(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    save_merged(model_of(tiny_model_dir), folder, tokenizer)
    return folder


def _harness_arguments(merged: Path, data_dir: Path, out: Path) -> list[str]:
    return [
        "--model", "trenchcoat", "--model_args", f"path={merged}", "--tasks",
        "mmlu_anatomy,mmlu_virology,piqa", "--num_fewshot", "2",
        "--batch_size", "auto", "--include_path", str(Path(harness.__file__).parent / "harness_tasks"), "--metadata",
        f"data_dir={data_dir}", "--output_path", str(out),
    ]  # fmt: skip


def _written(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


def test_the_harness_command_line_in_one_and_two_processes(
    merged: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    assert cli.main(["lm-eval", *_harness_arguments(merged, data_dir, tmp_path / "one")]) == 0
    assert re.search(r"\|anatomy +\|", capsys.readouterr().out)
    alone = _written(tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "trenchcoat.evaluation.harness"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, *_harness_arguments(merged, data_dir, tmp_path / "two")],
        env=environment, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    together = _written(tmp_path / "two")
    for name in ("mmlu_anatomy", "mmlu_virology", "piqa"):
        assert together[name]["acc,none"] == pytest.approx(alone[name]["acc,none"])
        assert together[name]["acc_stderr,none"] == pytest.approx(alone[name]["acc_stderr,none"])
