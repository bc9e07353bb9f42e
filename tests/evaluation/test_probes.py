"""Probes: a model that looks up the hidden text is right, one that sees only a window is not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from trenchcoat.config import UserError
from trenchcoat.evaluation.loglikelihood import Answer, Request
from trenchcoat.evaluation.probes import ASKED_TOKENS, CUE_TOKENS, PAIRS, Copy, Haystack, Needle, Probe, Recall
from trenchcoat.evaluation.report.tasks import plot_probes, probe_table
from trenchcoat.evaluation.task import TaskPlan
from trenchcoat.evaluation.task_results import ProbeRecord, TaskResults

OPENING = [0]


class LooksUp:
    """Predicts what followed the last occurrence of the current two tokens among the ``sight`` newest ones."""

    def __init__(self, sight: int) -> None:
        self.sight = sight

    def scores(self, requests: Sequence[Request]) -> list[Answer]:
        found = []
        for context, continuation in requests:
            text, hits = [*context, *continuation], 0
            for n in range(len(context), len(text)):
                seen = text[max(0, n - self.sight) : n]
                places = [i for i in range(len(seen) - 2) if seen[i : i + 2] == seen[-2:]]
                hits += bool(places) and seen[places[-1] + 2] == text[n]
            found.append(Answer(float(hits), hits == len(continuation), hits, len(continuation)))
        return found


def measured(
    probe: Probe,
    sight: int,
    hay: Haystack,
    *,
    trained: int,
    lengths: tuple[float, ...],
    rows: int,
    model: str = "student",
) -> ProbeRecord:
    plan = TaskPlan(tasks=(probe.name,), trained=trained, probe_lengths=lengths, probe_rows=rows)
    return probe.record(model, LooksUp(sight), hay, plan)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def hay() -> Haystack:
    rng = random.Random(0)
    return Haystack([rng.randrange(1, 400) for _ in range(9000)], OPENING, 2048)


@pytest.mark.parametrize("length", [64, 129, 1000])
@pytest.mark.parametrize("depth", [*Needle.depths, None])
def test_a_needle_row(length: int, depth: float | None, hay: Haystack) -> None:
    question = Needle().question(hay, random.Random("a"), length, depth)
    (context, answer) = question.requests[0]
    assert len(context) + len(answer) == length
    assert len(answer) == ASKED_TOKENS
    needle = [*context[-CUE_TOKENS:], *answer]
    places = [i for i in range(len(context) - CUE_TOKENS) if [*context, *answer][i : i + len(needle)] == needle]
    if depth is None:
        assert not places
    else:
        room = length - 1 - 2 * (CUE_TOKENS + ASKED_TOKENS)
        assert places == [1 + round(depth * room)]


def test_a_recall_row(hay: Haystack) -> None:
    question = Recall().question(hay, random.Random("b"), 500, 0.0)
    context, _ = question.requests[0]
    assert len(context) == 500
    assert len(question.requests) == PAIRS
    values = [continuation[0] for _, continuation in question.requests]
    assert len(set(values)) == PAIRS
    answers = [Answer(-1.0, False, 0, 1)] * PAIRS
    key = context[-2:]
    right = next(context[i + 2] for i in range(len(context) - 2) if context[i : i + 2] == key)
    for i, value in enumerate(values):
        assert question.share([*answers[:i], Answer(0.0, True, 1, 1), *answers[i + 1 :]]) == float(value == right)


def test_a_copy_row(hay: Haystack) -> None:
    (context, answer) = Copy().question(hay, random.Random("c"), 401, 0.0).requests[0]
    text = [*context, *answer][1:]
    assert text[:200] == text[200:]
    assert len(answer) == 64
    (other, same) = Copy().control(hay, random.Random("c"), 401).requests[0]
    assert same == answer
    assert other[-100:] == context[-100:]
    assert other[1:201] != context[1:201]


def test_lookup_finds_everything_and_a_window_does_not(hay: Haystack) -> None:
    for probe in (Needle(), Recall(), Copy()):
        name = probe.name
        found = TaskResults("made-up")
        for model, sight in (("student", 10_000), ("far_off", 48)):
            record = measured(probe, sight, hay, trained=256, lengths=(0.5, 4.0), rows=6, model=model)
            known = found.probes.setdefault(name, record)
            known.join(record)
        whole, window = known.shares["student"], known.shares["far_off"]
        assert all(sum(cell) / 6 > 0.9 for cells in whole for cell in cells)
        assert sum(window[1][0]) / 6 < 0.4  # at the greatest distance
        if name != "recall":
            assert all(sum(rows) / 6 < 0.2 for rows in known.controls["student"])
        assert known.lengths == [128, 1024]
        assert len(probe_table(known, "model").cells) == (3 if name == "recall" else 4)


def test_the_heat_map_is_drawn(tmp_path: Path, hay: Haystack) -> None:
    record = measured(Needle(), 99, hay, trained=128, lengths=(1.0, 2.0), rows=2)
    assert plot_probes(TaskResults("x", probes={"needle": record}), tmp_path / "probes.png")
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_probes(TaskResults("x"), tmp_path / "none.png")


def test_too_little_text_and_too_short_rows_are_errors(hay: Haystack) -> None:
    with pytest.raises(UserError, match=r"9 tokens; probes of 2,048 tokens"):
        Haystack(range(1, 10), OPENING, 2048)
    with pytest.raises(UserError, match="different tokens"):
        Haystack([1, 2, 3] * 100, OPENING, 64)
    with pytest.raises(UserError, match=r"0\.1 x 128 tokens"):
        measured(Copy(), 9, hay, trained=128, lengths=(0.1, 1.0), rows=2)
