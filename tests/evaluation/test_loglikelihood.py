"""Likelihoods of continuations equal those of whole rows, however prefixes are shared and rows batched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks_kit import TOLERANCE, model_of
from trenchcoat.config import UserError
from trenchcoat.evaluation import loglikelihood
from trenchcoat.evaluation.loglikelihood import LoglikelihoodScorer, Request, plan_groups
from trenchcoat.models.attach import set_mode
from trenchcoat.students import STUDENTS


def prompts(seed: int = 0) -> list[Request]:
    """Questions with three shared prefixes, four choices each, some of one token; a few with nothing in common."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 259) for _ in range(rng.randint(low, high))]

    found = []
    for beginning in (text(61, 61), text(64, 64), text(200, 200)):
        for number in range(5):
            context = beginning + text(1, 40)
            found += [Request(context, text(1, 1) if number % 2 else text(1, 5)) for _ in range(4)]
    found += [Request(text(1, 30), text(1, 5)) for _ in range(6)]
    rng.shuffle(found)
    return found


def plain(model: Any, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    """Every row alone, whole, without a cache."""
    found = []
    for context, continuation in requests:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logp = model(ids[:, :-1], use_cache=False).logits[0, -len(continuation) :].log_softmax(-1)
        tokens = torch.tensor(continuation)
        found.append((float(logp.gather(1, tokens[:, None]).sum()), bool((logp.argmax(-1) == tokens).all())))
    return found


@pytest.fixture(autouse=True)
def _share_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loglikelihood.LEAST_SAVED, "cpu", 10)


@pytest.mark.parametrize("kind", [*STUDENTS, "teacher", "kept softmax layer"])
def test_shared_prefixes_change_nothing(kind: str, tiny_model_dir: Path) -> None:
    settings = {"keep_softmax": (0,)} if kind == "kept softmax layer" else {}
    model = model_of(tiny_model_dir, kind if kind in STUDENTS else "terrace", **settings)
    if kind == "teacher":
        set_mode(model, "teacher")
    requests = prompts()
    scorer = LoglikelihoodScorer(model)
    answers = scorer.scores(requests)
    for answer, (logprob, greedy) in zip(answers, plain(model, requests), strict=True):
        assert answer.logprob == pytest.approx(logprob, abs=TOLERANCE)
        assert answer.greedy is greedy
    assert scorer.work.beginnings >= 3
    assert scorer.work.tokens_read < scorer.work.tokens_given / 2
    whole = LoglikelihoodScorer(model, share=False, batch_size=3)
    assert [a.logprob for a in whole.scores(requests)] == pytest.approx([a.logprob for a in answers], abs=TOLERANCE)
    assert whole.work.tokens_read == whole.work.tokens_given


def test_a_prefix_of_another_row_is_not_read_again(tiny_model_dir: Path) -> None:
    model = model_of(tiny_model_dir)
    context = list(range(10, 60))
    requests = [Request(context, [70]), Request(context, [71]), Request(context, [72, 73]), Request(context[:-3], [74])]
    scorer = LoglikelihoodScorer(model)
    answers = scorer.scores(requests)
    assert scorer.work.rows == 1
    assert scorer.work.tokens_read == 51
    assert [a.logprob for a in answers] == pytest.approx([p for p, _ in plain(model, requests)], abs=TOLERANCE)


def test_groups_save_more_than_their_call_costs() -> None:
    beginning = list(range(100))
    rows = sorted([beginning + [i] * 5 for i in range(3)] + [[9, i] for i in range(4)] + [[200]])
    groups = plan_groups([np.array(row) for row in rows], 50)
    assert sorted(len(group.members) for group in groups) == [3, 5]
    assert {group.shared for group in groups} == {0, 100}
    assert len(plan_groups([np.array(row) for row in rows], 500)) == 1
    assert sorted(i for group in groups for i in group.members) == list(range(8))


@pytest.mark.parametrize("seed", range(20))
def test_members_of_a_group_share_a_prefix_and_every_row_is_in_one_group(seed: int) -> None:
    rng = random.Random(seed)
    rows = sorted({tuple(rng.randrange(2) for _ in range(rng.randint(1, 12))) for _ in range(40)})
    groups = plan_groups([np.array(row) for row in rows], 3)
    assert sorted(i for group in groups for i in group.members) == list(range(len(rows)))
    for group in groups:
        assert len({rows[i][: group.shared] for i in group.members}) == 1
        assert all(len(rows[i]) >= group.shared for i in group.members)


def test_out_of_memory_halves_the_batch(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny_model_dir)
    requests = prompts()
    expected = [a.logprob for a in LoglikelihoodScorer(model).scores(requests)]
    forward = LoglikelihoodScorer._forward
    most = 2

    def small(self: LoglikelihoodScorer, beginning: Any, shared: int, rows: list[Any]) -> Any:
        if len(rows) > most:
            raise torch.OutOfMemoryError
        return forward(self, beginning, shared, rows)

    monkeypatch.setattr(LoglikelihoodScorer, "_forward", small)
    for batch_size in (None, 64):
        found = [a.logprob for a in LoglikelihoodScorer(model, batch_size=batch_size).scores(requests)]
        assert found == pytest.approx(expected, abs=TOLERANCE)
    most = 0
    with pytest.raises(UserError, match="a single row"):
        LoglikelihoodScorer(model).scores(requests)


def test_nothing_is_shared_if_the_rotary_embedding_depends_on_the_length(tiny_model_dir: Path) -> None:
    model = model_of(tiny_model_dir)
    model.config.rope_parameters = {"rope_type": "longrope"}
    scorer = LoglikelihoodScorer(model)
    scorer.scores(prompts())
    assert scorer.work.beginnings == 0
    assert "longrope" in scorer.why_not


@pytest.mark.parametrize("request_", [Request([], [1]), Request([1], [])])
def test_an_empty_context_or_continuation_is_an_error(request_: Request, tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="request 0"):
        LoglikelihoodScorer(model_of(tiny_model_dir)).scores([request_])
