"""The conclusions that an evaluation's numbers support, as sentences; the rules are the same for every run.

A comparison is answered "yes" only when the difference is in favour **and** more than two standard errors of the
paired difference away from zero; a difference within the noise is answered "no", because it was not shown. The
far-part questions are there because published hybrids of window and linear attention were found to bypass their
linear part (arXiv 2510.05901).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from trenchcoat.evaluation.columns import percent
from trenchcoat.evaluation.report.texts import bytes_text, signed
from trenchcoat.evaluation.results import CacheSize, Results
from trenchcoat.evaluation.rows import FAR_OFF, KEPT_WINDOW, REPORT_ROWS, TEACHER, WINDOW, ConstantRow, row_label
from trenchcoat.evaluation.statistics import Estimate, jackknife, paired_difference

SHIFT_LIMIT = 0.03
"""Largest difference from the teacher below 2W, in nats, that does not count as a domain shift."""
COPY_LIMIT = 0.9
"""Share of the gap in copying from which a model counts as one that copies."""
LONG_CONTEXT = 32768
"""Tokens at which caches are compared."""
LEAST_EFFECT = 0.005
"""Improvement in nats (half a per cent of perplexity) from which the far part counts as needed."""


class _NotMeasuredError(Exception):
    """The results lack what a question needs."""


@dataclass(frozen=True)
class Verdict:
    """One question about the conversion and its answer."""

    key: str
    question: str
    outcome: Literal["yes", "no", "not measured"]
    sentence: str
    """The answer with its numbers."""


_Question = tuple[str, str, Callable[[Results], tuple[bool, str]]]


def verdicts(results: Results) -> list[Verdict]:
    """All questions in the order of the report; those whose data is missing are "not measured"."""
    absent = {KEPT_WINDOW, ConstantRow.name} - results.rows.keys()  # rows that most conversions do not have
    beats: list[_Question] = [
        (f"beats_{name}", row.question, partial(_better_than, other=name))
        for name, row in REPORT_ROWS.items()
        if row.question and name not in absent
    ]
    asked: list[_Question] = [
        ("has_structure", "Is there anything beyond the window to carry?", _has_structure),
        *beats,
        ("beats_at_length", "Does it beat the untrained row beyond the trained length too?", _better_at_length),
        ("needs_far", "Does it need its linear (far) part?", _needs_far),
        ("no_shift", f"Is it still the teacher below 2W (within {SHIFT_LIMIT} nats)?", _no_shift),
        ("copies", f"Does it copy text from beyond the window (at least {COPY_LIMIT:.0%} of the gap)?", _copies),
        ("recalls", "Does it recall tokens from beyond the window better than the untrained row?", _recalls),
        ("smaller_cache", f"Is its cache smaller than the teacher's at {LONG_CONTEXT:,} tokens?", _smaller_cache),
        ("decodes_faster", "Does it decode faster than the teacher at the longest context measured?", _decodes_faster),
    ]
    return [_verdict(results, *question) for question in asked]


def _verdict(results: Results, key: str, question: str, answer: Callable[[Results], tuple[bool, str]]) -> Verdict:
    try:
        good, sentence = answer(results)
    except _NotMeasuredError as missing:
        return Verdict(key, question, "not measured", f"Not measured: {missing}.")
    return Verdict(key, question, "yes" if good else "no", sentence)


def headline(found: Sequence[Verdict]) -> str:
    """Counts of each answer."""
    against, unknown = (sum(v.outcome == outcome for v in found) for outcome in ("no", "not measured"))
    return f"Answers: {len(found) - against - unknown} YES, {against} NO, {unknown} not measured."


def better(difference: Estimate) -> bool:
    """Whether a difference is in favour, beyond its noise."""
    return difference.clear and difference.value > 0


def compare(results: Results, name: str, other: str, factor: int = 1) -> Estimate:
    """Loss of ``other`` minus loss of ``name`` past 2W, on rows of ``factor`` times the length: positive when ``name``
    is better.

    Of the difference as it is and the one with both rows' shifts below 2W taken off, the smaller: neither having
    learned the kind of text nor having been damaged by training counts in favour. Raises ``ValueError`` when one of
    them was not scored at that length.
    """
    mine, its = (results.rows[row].at(factor) for row in (name, other))
    if mine is None or its is None:
        raise ValueError(f"'{name}' and '{other}' were not both scored at {factor} times the length")
    plain = paired_difference(its.far, mine.far)
    if not mine.near.count or not its.near.count:
        return plain
    parts = (its.far, mine.far, its.near, mine.near)
    corrected = jackknife(parts, lambda far, own_far, near, own_near: (far - own_far) - (near - own_near))
    return corrected if corrected.value < plain.value else plain


def _converted(results: Results, needed: str, *others: str) -> str:
    """The row of the converted model. Raises if it or one of ``others`` is missing, or if it is one of ``others``."""
    name = results.converted()
    if name is None or name in others or any(other not in results.rows for other in others):
        raise _NotMeasuredError(f"this needs {needed}")
    return name


def _describe(difference: Estimate) -> str:
    """The loss difference as a phrase, with its error."""
    if not math.isfinite(difference.value):
        return "a loss is not a number"
    if not difference.clear:
        return f"the loss difference of {signed(difference)} nats (above 0: in favour) is within the noise"
    side = "lower" if difference.value > 0 else "HIGHER"
    return f"the loss is {side} by {signed(Estimate(abs(difference.value), difference.error))} nats"


def _has_structure(results: Results) -> tuple[bool, str]:
    if WINDOW not in results.rows or TEACHER not in results.rows:
        raise _NotMeasuredError(f"this needs the teacher and the row '{row_label(WINDOW)}'")
    gap = compare(results, TEACHER, WINDOW)
    good = better(gap) and gap.value >= LEAST_EFFECT
    text = f"Past 2W, the teacher against '{row_label(WINDOW)}', untrained: {_describe(gap)}."
    return good, text if good else f"{text} Without such a gap nothing can be recovered on this text."


def _better_than(results: Results, other: str) -> tuple[bool, str]:
    name = _converted(results, f"a converted model and the row '{row_label(other)}'", other)
    difference = compare(results, name, other)
    good = better(difference)
    verb = "beats" if good else "does NOT beat"
    mine, its = results.rows[name].far_perplexity, results.rows[other].far_perplexity
    return good, (
        f"'{row_label(name)}' {verb} '{row_label(other)}' on tokens past 2W: perplexity {mine:.3f} against {its:.3f}; "
        f"{_describe(difference)}."
    )


def _better_at_length(results: Results) -> tuple[bool, str]:
    rival = results.untrained_rival() or ""
    name = _converted(results, "a converted model and an untrained row", rival)
    factor = results.factors()[-1]
    if factor == 1 or results.rows[name].at(factor) is None or results.rows[rival].at(factor) is None:
        raise _NotMeasuredError("no rows longer than those of the training were scored")
    difference = compare(results, name, rival, factor)
    good = better(difference)
    verb = "beats" if good else "does NOT beat"
    tokens = factor * results.seq_len
    return good, f"On rows of {tokens:,} tokens it {verb} '{row_label(rival)}' past 2W: {_describe(difference)}."


def _needs_far(results: Results) -> tuple[bool, str]:
    name = _converted(results, "the converted model with its far part switched off", FAR_OFF)
    difference = compare(results, name, FAR_OFF)
    good = better(difference) and difference.value >= LEAST_EFFECT
    mine, its = results.rows[name].far_perplexity, results.rows[FAR_OFF].far_perplexity
    numbers = f"perplexity past 2W is {mine:.3f} with it and {its:.3f} without; {_describe(difference)}"
    if good:
        text = f"needs its linear part: {numbers}."
    elif better(difference):
        text = f"hardly needs its linear part: {numbers}, under the {LEAST_EFFECT} that would count."
    elif difference.value + 2 * difference.error < LEAST_EFFECT:
        text = f"does NOT need its linear part: {numbers}. What it knows past 2W comes from elsewhere."
    else:
        text = f"was NOT shown to need its linear part: {numbers}, which is too large to tell."
    return good, f"'{row_label(name)}' {text}"


def _no_shift(results: Results) -> tuple[bool, str]:
    name = _converted(results, "a converted model and the teacher", TEACHER)
    shift = results.shift(name)
    if shift is None:
        raise _NotMeasuredError("a student without a near part has no tokens where it is the teacher")
    text = f"Below 2W its loss minus the teacher's is {signed(shift)} nats"
    if abs(shift.value) <= SHIFT_LIMIT:
        return True, f"{text}."
    if shift.value < 0:
        return False, f"{text}: training taught it the kind of text, which looks like recovered context past 2W too."
    return False, f"{text}: training damaged what the model knew."


def _copies(results: Results) -> tuple[bool, str]:
    name = _converted(results, "a converted model")
    found = {factor: results.copy_closed(name, factor) for factor in results.factors()}
    shares = {factor: share for factor, share in found.items() if share is not None}
    if not shares:
        raise _NotMeasuredError("no copies were scored, or the teacher does not copy better than a window")
    good = all(share.value >= COPY_LIMIT for share in shares.values())
    parts = ", ".join(f"{percent(share)} at {f * results.seq_len:,} tokens" for f, share in shares.items())
    start = f"On a text followed by itself, of the gap between '{row_label(WINDOW)}' and the teacher,"
    return good, f"{start} it closes {parts}."


def _recalls(results: Results) -> tuple[bool, str]:
    rival = results.untrained_rival() or ""
    name = _converted(results, "a converted model and an untrained row", rival)
    mine, its = results.rows[name], results.rows[rival]
    if not mine.recall.count:
        raise _NotMeasuredError("the rows hold no recall probe (they are too short for the window)")
    hits = paired_difference(mine.recall_hits, its.recall_hits)
    teacher = results.rows.get(TEACHER)
    beside = f"; the teacher's is {teacher.recall_hits.mean:.1%}" if teacher else ""
    in_points = percent(hits).replace(" %", "") + ("" if hits.clear else ", within the noise")
    return better(hits), (
        f"On {mine.recall.count} probes the accuracy of '{row_label(name)}' is {mine.recall_hits.mean:.1%} and that of "
        f"'{row_label(rival)}' {its.recall_hits.mean:.1%} (difference in points: {in_points}){beside}."
    )


def cache_text(cache: CacheSize) -> str:
    """``1.3 MiB + 2.0 KiB a token``."""
    parts = [bytes_text(cache.constant)] if cache.constant else []
    parts += [f"{bytes_text(cache.per_token)} a token"] if cache.per_token else []
    for most in sorted({most for _, most in cache.limited}):
        rate = sum(rate for rate, other in cache.limited if other == most)
        parts.append(f"{bytes_text(rate)} a token up to {most:,} tokens")
    return " + ".join(parts) or "nothing"


def _smaller_cache(results: Results) -> tuple[bool, str]:
    name = _converted(results, "a converted model and the teacher", TEACHER)
    mine, its = results.rows[name].cache, results.rows[TEACHER].cache
    if mine is None or its is None:
        raise _NotMeasuredError("the caches of the two models were not measured")
    small, large = mine.at(LONG_CONTEXT), its.at(LONG_CONTEXT)
    kind = "" if mine.per_token or mine.limited else ", whatever the length"
    return small < large, (
        f"It holds {cache_text(mine)}{kind}; the teacher {cache_text(its)}. At {LONG_CONTEXT:,} tokens: "
        f"{bytes_text(small)} against {bytes_text(large)} ({100 * small / large:.1f} %)."
    )


def _decodes_faster(results: Results) -> tuple[bool, str]:
    both = {p.context: p for p in results.decode.get("teacher", [])}
    pairs = [(both[p.context], p) for p in results.decode.get("student", []) if p.context in both]
    if not pairs:
        raise _NotMeasuredError("decoding was not timed for both models")
    teacher, student = max(pairs, key=lambda pair: pair[0].context)
    times = f"{student.ms_per_token:.2f} ms a token against {teacher.ms_per_token:.2f} ms at {student.context:,} tokens"
    if student.ms_quartiles[1] < teacher.ms_quartiles[0]:
        crossing = results.crossing()
        since = "" if crossing is None else f", and from about {crossing:,} tokens of context on"
        return True, f"Faster: {times}{since}."
    if student.ms_quartiles[0] > teacher.ms_quartiles[1]:
        return False, f"SLOWER: {times}. There the fixed work of a step still outweighs attention over the context."
    return False, f"NOT faster: {times}; the spread of both overlaps."
