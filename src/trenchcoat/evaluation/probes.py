"""Long-context probes: needle, recall and copy, made from held-out text in the model's own tokens.

Nothing is downloaded and there are no natural-language questions, so the probes are meaningful for models of any size.
A row is held-out text (the filler) with something hidden in it, at 0.5 to 16 times the length the model was trained on.
Every model gets the same rows. To add a probe, write a class here and list it in ``own_tasks.py``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trenchcoat.config import UserError
from trenchcoat.data.samples import opening_tokens
from trenchcoat.evaluation.task import EvalTask, ScoredModel, TaskPlan

if TYPE_CHECKING:
    from trenchcoat.evaluation.loglikelihood import Answer, LoglikelihoodScorer
    from trenchcoat.evaluation.task_results import ProbeRecord

CUE_TOKENS, ASKED_TOKENS = 8, 8
"""Tokens of a needle that are repeated as its cue, and that the model must predict."""
PAIRS = 8
MOST_COPIED = 64
"""Tokens at the end of a copy that the model must predict; at most a quarter of the row."""
LEAST_LENGTH = 64
SEED = 7


@dataclass(frozen=True)
class Question:
    """One row: what to score, and how the answers become a share of right tokens."""

    requests: Sequence[tuple[Sequence[int], Sequence[int]]]
    """Token ids of a context, and of the continuation to score."""
    share: Callable[[Sequence[Answer]], float]


class Haystack:
    """Filler, passages and rare tokens from held-out text.

    ``corpus``: token ids of held-out text, special tokens left out. ``opening``: ids that every row starts with.
    Raises ``UserError`` for a text too short for rows of ``longest`` tokens.
    """

    def __init__(self, corpus: Sequence[int], opening: Sequence[int], longest: int) -> None:
        if len(corpus) < 2 * longest:
            raise UserError(
                f"the held-out text has {len(corpus):,} tokens; probes of {longest:,} tokens need twice their length. "
                "Give more text (data.validation_rows, data.path) or shorter --probe-lengths"
            )
        self.corpus, self.opening = list(corpus), list(opening)
        counts = Counter(self.corpus)
        known = sorted(counts, key=lambda token: (-counts[token], token))
        rare = known[len(known) // 4 : -len(known) // 10 or None]
        if len(rare) < 3 * PAIRS:
            raise UserError(
                f"the held-out text has {len(known)} different tokens, too few for {PAIRS} pairs; give more text"
            )
        self.rare = rare
        """Tokens that are neither frequent nor among the rarest, most frequent first."""

    def filler(self, rng: random.Random, tokens: int) -> tuple[list[int], int]:
        """A span of text, and where it starts."""
        start = rng.randrange(len(self.corpus) - tokens + 1)
        return self.corpus[start : start + tokens], start

    def passage(self, rng: random.Random, tokens: int, start: int, length: int) -> list[int]:
        """A span that does not overlap the filler ``[start, start + length)``."""
        free = [(0, start - tokens), (start + length, len(self.corpus) - tokens)]
        places = [(low, high) for low, high in free if high >= low]
        low, high = places[rng.randrange(len(places))]
        at = rng.randint(low, high)
        return self.corpus[at : at + tokens]


def share_of_hits(answers: Sequence[Answer]) -> float:
    """Share of the first request's tokens that are first choices."""
    return answers[0].hits / answers[0].tokens


class Probe(EvalTask):
    """A task made from held-out text: shares of right tokens by length of the row and depth of the answer."""

    long_context = True
    depths: ClassVar[tuple[float, ...]] = (0.0,)
    """Where in the text the answer is (0: at the start); one entry for a probe without a depth."""
    chance: ClassVar[float | None] = None
    """Accuracy of guessing, if known."""

    def question(self, hay: Haystack, rng: random.Random, length: int, depth: float) -> Question:
        """One row of ``length`` tokens, context and asked tokens together."""
        raise NotImplementedError

    def control(self, hay: Haystack, rng: random.Random, length: int) -> Question | None:
        """The same ending without the text it refers to; None if chance is known."""
        return None

    def score(self, model: ScoredModel, plan: TaskPlan) -> Mapping[str, ProbeRecord]:
        """The record of this probe."""
        assert plan.trained is not None, "set by evaluate_tasks"
        corpus = corpus_tokens(model.held_out(), model.tokenizer)
        hay = Haystack(corpus, opening_tokens(model.tokenizer), round(plan.trained * max(plan.probe_lengths)))
        return {self.name: self.record(model.name, model.scorer, hay, plan)}

    def record(self, model: str, scorer: LoglikelihoodScorer, hay: Haystack, plan: TaskPlan) -> ProbeRecord:
        """The shares of one model on the rows of ``plan``."""
        from trenchcoat.evaluation.task_results import ProbeRecord

        trained = plan.trained or 0
        sizes = [round(trained * length) for length in plan.probe_lengths]
        if min(sizes) < LEAST_LENGTH:
            raise UserError(
                f"--probe-lengths: {min(plan.probe_lengths):g} x {trained} tokens is under {LEAST_LENGTH}; "
                "give longer ones"
            )
        questions: dict[tuple[int, int], list[Question]] = {}
        for i, size in enumerate(sizes):
            seeds = [f"{SEED} {self.name} {size} {row}" for row in range(plan.probe_rows)]
            for j, depth in enumerate(self.depths):
                questions[i, j] = [self.question(hay, random.Random(seed), size, depth) for seed in seeds]
            controls = [self.control(hay, random.Random(seed), size) for seed in seeds]
            questions[i, -1] = [control for control in controls if control is not None]
        shares = _shares(scorer, questions)
        return ProbeRecord(
            name=self.name,
            lengths=sizes,
            depths=[*self.depths],
            trained=trained,
            chance=self.chance,
            settings={"rows": plan.probe_rows, "seed": SEED, "corpus_tokens": len(hay.corpus)},
            shares={model: [[shares[i, j] for j in range(len(self.depths))] for i in range(len(sizes))]},
            controls={model: [shares[i, -1] for i in range(len(sizes)) if shares[i, -1]]},
        )


class Needle(Probe):
    """A passage from elsewhere is hidden once; the row ends with its first tokens, the model must predict the next."""

    name = "needle"
    description = "a passage hidden at some depth; the row ends with its first tokens, the next ones are scored"
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)

    def question(self, hay: Haystack, rng: random.Random, length: int, depth: float | None) -> Question:
        """The needle is at ``depth`` of the row; None leaves it out."""
        room = length - len(hay.opening) - 2 * (CUE_TOKENS + ASKED_TOKENS)
        text, start = hay.filler(rng, room + CUE_TOKENS + ASKED_TOKENS)
        needle = hay.passage(rng, CUE_TOKENS + ASKED_TOKENS, start, len(text))
        if depth is not None:
            at = round(depth * room)
            text = [*text[:at], *needle, *text[at:room]]
        context = [*hay.opening, *text, *needle[:CUE_TOKENS]]
        return Question([(context, needle[CUE_TOKENS:])], share_of_hits)

    def control(self, hay: Haystack, rng: random.Random, length: int) -> Question:
        """The same ending without the passage."""
        return self.question(hay, rng, length, None)


class Recall(Probe):
    """Eight triples (two rare tokens and a third) are scattered; the row ends with the first two tokens of one.

    Scores whether its third token is the likeliest of the eight: associative recall with one query, after arXiv
    2312.04927.
    """

    name = "recall"
    description = "eight scattered triples; the row ends with the first two tokens of one, its third is scored"
    chance = 1 / PAIRS

    def question(self, hay: Haystack, rng: random.Random, length: int, depth: float) -> Question:
        """Triples at random places."""
        tokens = rng.sample(hay.rare, 3 * PAIRS)
        pairs = [tokens[3 * i : 3 * i + 3] for i in range(PAIRS)]
        text, _ = hay.filler(rng, length - len(hay.opening) - 3 * PAIRS - 2)
        cuts = sorted(rng.randrange(len(text) + 1) for _ in pairs)
        context, done = [*hay.opening], 0
        for cut, pair in zip(cuts, pairs, strict=True):
            context += [*text[done:cut], *pair]
            done = cut
        asked = rng.randrange(PAIRS)
        context += [*text[done:], *pairs[asked][:2]]

        def share(answers: Sequence[Answer]) -> float:
            """1 where the right token is the likeliest of the eight."""
            return float(max(range(PAIRS), key=lambda i: answers[i].logprob) == asked)

        return Question([(context, pair[2:]) for pair in pairs], share)


class Copy(Probe):
    """Half a row of text, then the same text; the model must predict its last tokens."""

    name = "copy"
    description = "half a row of text, then the same text"

    def question(self, hay: Haystack, rng: random.Random, length: int, depth: float | None) -> Question:
        """With a ``depth`` of None the first half is other text."""
        half = (length - len(hay.opening)) // 2
        text, start = hay.filler(rng, half)
        first = text if depth is not None else hay.passage(rng, half, start, half)
        asked = min(MOST_COPIED, half // 2)
        return Question([([*hay.opening, *first, *text[:-asked]], text[-asked:])], share_of_hits)

    def control(self, hay: Haystack, rng: random.Random, length: int) -> Question:
        """Other text in place of the first half."""
        return self.question(hay, rng, length, None)


def _shares(
    scorer: LoglikelihoodScorer, questions: dict[tuple[int, int], list[Question]]
) -> dict[tuple[int, int], list[float]]:
    flat = [question for cell in questions.values() for question in cell]
    answers = iter(scorer.scores([request for question in flat for request in question.requests]))
    return {
        key: [question.share([next(answers) for _ in question.requests]) for question in cell]
        for key, cell in questions.items()
    }


def corpus_tokens(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Token ids without the tokenizer's special ones."""
    special = set(tokenizer.all_special_ids)
    return [token for token in ids if token not in special]
