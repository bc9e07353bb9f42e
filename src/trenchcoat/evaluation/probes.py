"""What is left of a long text: needle, recall and copy, made from the model's own text and tokenizer.

Nothing is downloaded and nothing is asked in words, so the probes mean something for models of any size. A row is
held-out text (the filler) with something hidden in it, at 0.5 to 16 times the length the model was trained on.

* ``needle``: a passage from elsewhere stands once, at some depth; the row ends with the passage's first tokens. Share
  of the next tokens that are the model's first choice. Its control: the same ending, the passage not there.
* ``recall``: eight pairs of two rare tokens and one more, scattered; the row ends with the two tokens of one pair.
  Whether the right one of the eight is the likeliest (associative recall with one query, after arXiv 2312.04927).
* ``copy``: half a row of text, then the same text again; share of its last tokens that are the first choice. Its
  control: other text in place of the first half.

Every model gets the same rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trenchcoat.config import UserError
from trenchcoat.evaluation.loglikelihood import Answer, LoglikelihoodScorer, Request
from trenchcoat.evaluation.task_results import ProbeRecord

PROBES = ("needle", "recall", "copy")
LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Lengths, in lengths of a training row."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CUE, ANSWER = 8, 8
"""Tokens of a needle that are shown again, and that are asked for."""
PAIRS = 8
COPIED = 64
"""Tokens at the end of a copy that are asked for, a quarter of the row where that is less."""
LEAST_LENGTH = 64
SEED = 7


@dataclass(frozen=True)
class _Question:
    """One row: what to score, and how the answers make a share."""

    requests: list[Request]
    share: Callable[[Sequence[Answer]], float]


class Haystack:
    """Filler, passages and rare tokens from held-out text.

    ``corpus``: token ids of held-out text, special tokens left out. ``opening``: ids every row begins with (BOS).
    Raises ``UserError`` for a text too small for rows of ``longest`` tokens.
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
                f"the held-out text has {len(known)} different tokens, too few for {PAIRS} pairs; give more"
            )
        self.rare = rare

    def filler(self, rng: random.Random, tokens: int) -> tuple[list[int], int]:
        """A stretch of text, and where it begins."""
        start = rng.randrange(len(self.corpus) - tokens + 1)
        return self.corpus[start : start + tokens], start

    def passage(self, rng: random.Random, tokens: int, start: int, length: int) -> list[int]:
        """A stretch that does not overlap the filler ``[start, start + length)``."""
        free = [(0, start - tokens), (start + length, len(self.corpus) - tokens)]
        places = [(low, high) for low, high in free if high >= low]
        low, high = places[rng.randrange(len(places))]
        at = rng.randint(low, high)
        return self.corpus[at : at + tokens]


def needle_row(hay: Haystack, rng_seed: str, length: int, depth: float | None) -> _Question:
    """A needle at ``depth`` of a row of ``length`` tokens; None leaves it out (the control)."""
    rng = random.Random(rng_seed)
    room = length - len(hay.opening) - 2 * (CUE + ANSWER)
    text, start = hay.filler(rng, room + CUE + ANSWER)
    needle = hay.passage(rng, CUE + ANSWER, start, len(text))
    if depth is not None:
        at = round(depth * room)
        text = [*text[:at], *needle, *text[at:room]]
    context = [*hay.opening, *text, *needle[:CUE]]
    return _Question([Request(context, needle[CUE:])], _hits)


def recall_row(hay: Haystack, rng_seed: str, length: int) -> _Question:
    """Pairs scattered over a row of ``length`` tokens; the last two tokens ask for one of them."""
    rng = random.Random(rng_seed)
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
        return float(max(range(PAIRS), key=lambda i: answers[i].logprob) == asked)

    return _Question([Request(context, pair[2:]) for pair in pairs], share)


def copy_row(hay: Haystack, rng_seed: str, length: int, *, present: bool = True) -> _Question:
    """Half a row of text and the same again; without ``present`` the first half is other text (the control)."""
    rng = random.Random(rng_seed)
    half = (length - len(hay.opening)) // 2
    text, start = hay.filler(rng, half)
    first = text if present else hay.passage(rng, half, start, half)
    asked = min(COPIED, half // 2)
    context = [*hay.opening, *first, *text[:-asked]]
    return _Question([Request(context, text[-asked:])], _hits)


def _hits(answers: Sequence[Answer]) -> float:
    """Share of the first request's tokens that are first choices."""
    return answers[0].hits / answers[0].tokens


def probe(
    name: str,
    scorer: LoglikelihoodScorer,
    hay: Haystack,
    *,
    trained: int,
    lengths: Sequence[float] = LENGTHS,
    rows: int = 16,
    model_name: str,
) -> ProbeRecord:
    """Score one probe; a record with the shares of this one model."""
    sizes = [round(trained * length) for length in lengths]
    if min(sizes) < LEAST_LENGTH:
        raise UserError(
            f"--probe-lengths: {min(lengths):g} x {trained} tokens is under {LEAST_LENGTH}; give longer ones"
        )
    depths = list(DEPTHS) if name == "needle" else [0.0]
    questions: dict[tuple[int, int], list[_Question]] = {}
    controls: dict[int, list[_Question]] = {}
    for i, size in enumerate(sizes):
        seeds = [f"{SEED} {name} {size} {row}" for row in range(rows)]
        if name == "needle":
            questions |= {(i, j): [needle_row(hay, s, size, depth) for s in seeds] for j, depth in enumerate(depths)}
            controls[i] = [needle_row(hay, s, size, None) for s in seeds]
        elif name == "recall":
            questions[i, 0] = [recall_row(hay, s, size) for s in seeds]
        else:
            questions[i, 0] = [copy_row(hay, s, size) for s in seeds]
            controls[i] = [copy_row(hay, s, size, present=False) for s in seeds]
    shares = _shares(scorer, {**questions, **{(i, -1): asked for i, asked in controls.items()}})
    return ProbeRecord(
        name=name,
        lengths=sizes,
        depths=depths,
        trained=trained,
        chance=1 / PAIRS if name == "recall" else None,
        settings={"rows": rows, "seed": SEED, "corpus_tokens": len(hay.corpus)},
        shares={model_name: [[shares[i, j] for j in range(len(depths))] for i in range(len(sizes))]},
        controls={model_name: [shares[i, -1] for i in sorted(controls)]},
    )


def _shares(
    scorer: LoglikelihoodScorer, questions: dict[tuple[int, int], list[_Question]]
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
