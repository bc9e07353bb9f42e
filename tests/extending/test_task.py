"""A new task that needs no harness: one class and one line. The example: which of two verbs is more likely."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tasks_kit import SHORTEST_RUN
from trenchcoat.cli import app as cli
from trenchcoat.evaluation.own_tasks import OWN_TASKS
from trenchcoat.evaluation.statistics import mean_estimate
from trenchcoat.evaluation.task import EvalTask, ScoredModel, TaskPlan
from trenchcoat.evaluation.task_results import ModelScore, TaskRecord, TaskResults


class Grammar(EvalTask):
    """Is "the coat is" more likely than "the coat are"?"""

    name = "grammar"
    description = "one verb against another"

    def score(self, model: ScoredModel, plan: TaskPlan) -> Mapping[str, TaskRecord]:
        """One record."""
        pairs = [("The coat", " is", " are"), ("The pockets", " are", " is")][: plan.limit]
        texts = [(begin, verb) for begin, *verbs in pairs for verb in verbs]
        answers = model.scorer.scores([(model.tokenizer(a).input_ids, model.tokenizer(b).input_ids) for a, b in texts])
        rows = [float(right.logprob > wrong.logprob) for right, wrong in zip(answers[::2], answers[1::2], strict=True)]
        scores = {model.name: ModelScore({"acc": mean_estimate(rows)}, {"acc": rows})}
        return {self.name: TaskRecord(self.name, self.name, len(rows), rows_id="two", scores=scores)}


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OWN_TASKS, "grammar", Grammar())


@pytest.mark.usefixtures("_registered")
def test_a_task_is_offered_scored_and_compared_with_the_teacher(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "grammar" in capsys.readouterr().out
    assert cli.main(["linearize", "demo", *tiny_overrides, *SHORTEST_RUN]) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--tasks", "grammar", "--teacher", "--device", "cpu"]) == 0
    assert "grammar" in capsys.readouterr().out
    found = TaskResults.load(tmp_path / "run" / "tasks.json").tasks["grammar"]
    assert set(found.scores) == {"student", "teacher"}
    assert found.count == 2
    assert "| grammar | – | 2 | – | acc |" in (tmp_path / "run" / "report.md").read_text()
