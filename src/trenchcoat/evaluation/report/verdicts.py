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
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.rows import (
    FAR_OFF,
    REPORT_ROWS,
    TEACHER,
    UNTRAINED,
    LoraOnlyRow,
    WindowSinksLoraRow,
    WindowSinksRow,
    row_label,
)
from trenchcoat.evaluation.statistics import Estimate, RowSums, paired_difference

SHARE_TARGET = 0.9
"""Target: share of the loss gap between the untrained swap and the teacher, over all tokens."""
FAR_SHARE_TARGET = 0.5
"""Target: share of the loss gap between the better window + sinks row and the teacher, on tokens past 2W."""
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
    target: bool = False
    """True for the project's own targets."""


def verdicts(results: Results) -> list[Verdict]:
    """All questions in the order of the report; those whose data is missing are "not measured"."""
    from_swap = "Target: close at least {:.0%} of the gap from the untrained swap to the teacher, all tokens"
    from_window = "Target: close at least {:.0%} of the gap from window + sinks to the teacher, past 2W"
    beats = {window_only: [_beats(name, window_only) for name in REPORT_ROWS] for window_only in (True, False)}
    asked: list[_Question | None] = [
        ("order_target", "Target: past 2W, better than LoRA only and than both window + sinks rows", _order_target),
        ("share_target", from_swap.format(SHARE_TARGET), _share_target),
        ("far_share_target", from_window.format(FAR_SHARE_TARGET), _far_share_target),
        ("has_structure", "Is there anything beyond the window to carry?", _has_structure),
        *beats[True],
        ("needs_far", "Does it need its linear (far) part?", _needs_far),
        *beats[False],
        ("recalls", "Does it recall tokens from beyond the window better than window + sinks?", _recalls),
        ("constant_state", "Is the decoding state of constant size?", _constant_state),
        ("decodes_faster", "Does it decode faster than the teacher at the longest context measured?", _decodes_faster),
    ]
    return [_verdict(results, *question) for question in asked if question is not None]


_Question = tuple[str, str, Callable[[Results], tuple[bool, str]]]


def _beats(name: str, window_only: bool) -> _Question | None:
    """The question whether the converted model beats row ``name``, if that row has one."""
    row = REPORT_ROWS[name]
    asks = bool(row.question) and row.window_only == window_only
    return (f"beats_{name}", row.question, partial(_better_than, other=name)) if asks else None


def _verdict(results: Results, key: str, question: str, answer: Callable[[Results], tuple[bool, str]]) -> Verdict:
    target = question.startswith("Target: ")
    try:
        good, sentence = answer(results)
    except _NotMeasuredError as missing:
        return Verdict(key, question, "not measured", f"Not measured: {missing}.", target)
    return Verdict(key, question, "yes" if good else "no", sentence, target)


def headline(found: Sequence[Verdict]) -> str:
    """One-sentence summary: targets met, and counts of each answer."""
    targets = [verdict.outcome for verdict in found if verdict.target]
    against, unknown = (sum(v.outcome == outcome for v in found) for outcome in ("no", "not measured"))
    parts = [f"Targets met: {targets.count('yes')} of {len(targets)}"]
    parts[0] += f" ({targets.count('not measured')} not measured)" if "not measured" in targets else ""
    parts.append(f"answers: {len(found) - against - unknown} YES, {against} NO, {unknown} not measured")
    return "; ".join(parts) + "."


def _better(difference: Estimate) -> bool:
    return difference.clear and difference.value > 0


def _converted(results: Results, needed: str, *others: str) -> str:
    """The row of the converted model. Raises if it or one of ``others`` is missing, or if it is one of ``others``."""
    name = results.converted()
    if name is None or name in others or any(other not in results.rows for other in others):
        raise _NotMeasuredError(f"this needs {needed}")
    return name


def _compare(results: Results, name: str, other: str) -> Estimate:
    """Loss of ``other`` minus loss of ``name`` past 2W: positive when ``name`` is better."""
    return paired_difference(results.rows[other].far, results.rows[name].far)


def _describe(difference: Estimate) -> str:
    """The loss difference as a phrase, with its error."""
    if not math.isfinite(difference.value):
        return "a loss is not a number"
    if not difference.clear:
        return f"the loss difference of {signed(difference)} nats (above 0: in favour) is within the noise"
    side = "lower" if difference.value > 0 else "HIGHER"
    return f"the loss is {side} by {signed(Estimate(abs(difference.value), difference.error))} nats"


def _has_structure(results: Results) -> tuple[bool, str]:
    window = results.best_window_row()
    if window is None or TEACHER not in results.rows:
        raise _NotMeasuredError("this needs the teacher and a window + sinks row")
    gap = _compare(results, TEACHER, window)
    good = _better(gap) and gap.value >= LEAST_EFFECT
    text = f"Past 2W, the teacher against the better window + sinks row ({row_label(window)}): {_describe(gap)}."
    return good, text if good else f"{text} Without such a gap no linear part can help on this text."


def _better_than(results: Results, other: str) -> tuple[bool, str]:
    name = _converted(results, f"a converted model and the row '{row_label(other)}'", other)
    difference = _compare(results, name, other)
    good = _better(difference)
    verb = "beats" if good else "does NOT beat"
    mine, its = results.rows[name].far_perplexity, results.rows[other].far_perplexity
    return good, (
        f"'{row_label(name)}' {verb} '{row_label(other)}' on tokens past 2W: perplexity {mine:.3f} against {its:.3f}; "
        f"{_describe(difference)}."
    )


def _needs_far(results: Results) -> tuple[bool, str]:
    name = _converted(results, "the converted model with its far part switched off", FAR_OFF)
    difference = _compare(results, name, FAR_OFF)
    good = _better(difference) and difference.value >= LEAST_EFFECT
    mine, its = results.rows[name].far_perplexity, results.rows[FAR_OFF].far_perplexity
    numbers = f"perplexity past 2W is {mine:.3f} with it and {its:.3f} without; {_describe(difference)}"
    if good:
        text = f"needs its linear part: {numbers}."
    elif _better(difference):
        text = f"hardly needs its linear part: {numbers}, under the {LEAST_EFFECT} that would count."
    elif difference.value + 2 * difference.error < LEAST_EFFECT:
        text = f"does NOT need its linear part: {numbers}. It is a window model in disguise."
    else:
        text = f"was NOT shown to need its linear part: {numbers}, which is too large to tell."
    return good, f"'{row_label(name)}' {text}"


def _recalls(results: Results) -> tuple[bool, str]:
    window = results.best_window_row() or ""
    name = _converted(results, "a converted model and a window + sinks row", window)
    mine, its = results.rows[name], results.rows[window]
    if not mine.recall.count:
        raise _NotMeasuredError("the rows hold no recall probe (they are too short for the window)")
    hits = paired_difference(mine.recall_hits, its.recall_hits)
    teacher = results.rows.get(TEACHER)
    beside = f"; the teacher's is {teacher.recall_hits.mean:.1%}" if teacher else ""
    in_points = percent(hits).replace(" %", "") + ("" if hits.clear else ", within the noise")
    return _better(hits), (
        f"On {mine.recall.count} probes the accuracy of '{row_label(name)}' is {mine.recall_hits.mean:.1%} and that of "
        f"'{row_label(window)}' {its.recall_hits.mean:.1%} (difference in points: {in_points}){beside}."
    )


def _constant_state(results: Results) -> tuple[bool, str]:
    student, teacher = results.decode.get("student", []), results.decode.get("teacher")
    if len(student) < 2:
        raise _NotMeasuredError("decoding was not timed at two context lengths")
    sizes = sorted({point.cache_bytes for point in student})
    good = len(sizes) == 1
    span = bytes_text(sizes[0]) if good else f"{bytes_text(sizes[0])} to {bytes_text(sizes[-1])}"
    text = f"{'Constant' if good else 'NOT constant'}: {span}"
    text += f" from {student[0].context:,} to {student[-1].context:,} tokens of context."
    if teacher:
        last = teacher[-1]
        text += f" The teacher's cache holds {bytes_text(last.cache_bytes)} at {last.context:,} tokens."
    return good, text


def _decodes_faster(results: Results) -> tuple[bool, str]:
    both = {p.context: p for p in results.decode.get("teacher", [])}
    pairs = [(both[p.context], p) for p in results.decode.get("student", []) if p.context in both]
    if not pairs:
        raise _NotMeasuredError("decoding was not timed for both models")
    teacher, student = max(pairs, key=lambda pair: pair[0].context)
    times = f"{student.ms_per_token:.2f} ms a token against {teacher.ms_per_token:.2f} ms at {student.context:,} tokens"
    if student.ms_quartiles[1] < teacher.ms_quartiles[0]:
        return True, f"Faster: {times}."
    if student.ms_quartiles[0] > teacher.ms_quartiles[1]:
        return False, f"SLOWER: {times}. There the fixed work of a step still outweighs attention over the context."
    return False, f"NOT faster: {times}; the spread of both overlaps."


def _order_target(results: Results) -> tuple[bool, str]:
    others = (LoraOnlyRow.name, WindowSinksRow.name, WindowSinksLoraRow.name)
    name = _converted(results, "a transferred model and " + ", ".join(map(row_label, others)), *others)
    found = {row_label(other): _compare(results, name, other) for other in others}
    lost = [other for other, difference in found.items() if not _better(difference)]
    parts = "; ".join(f"against '{other}' {_describe(difference)}" for other, difference in found.items())
    start = f"MISSED (not better than {', '.join(lost)})" if lost else "Met"
    return not lost, f"{start}: {parts}."


def _share_target(results: Results) -> tuple[bool, str]:
    all_tokens = {name: scores.all for name, scores in results.rows.items()}
    return _gap_target(results, all_tokens, UNTRAINED, results.share_closed, SHARE_TARGET)


def _far_share_target(results: Results) -> tuple[bool, str]:
    past_2w = {name: scores.far for name, scores in results.rows.items()}
    return _gap_target(results, past_2w, results.best_window_row() or "", results.far_share_closed, FAR_SHARE_TARGET)


def _gap_target(
    results: Results,
    losses: dict[str, RowSums],
    bottom: str,
    share_closed: Callable[[str], Estimate | None],
    goal: float,
) -> tuple[bool, str]:
    name = _converted(results, "the teacher, the converted model and the row the gap starts from", bottom, TEACHER)
    share = share_closed(name)
    span = f"loss {losses[bottom].mean:.4f} ('{row_label(bottom)}') to {losses[TEACHER].mean:.4f} (teacher)"
    if share is None:
        gap = signed(paired_difference(losses[bottom], losses[TEACHER]))
        return False, f"MISSED: there is no clear gap to close ({span}, difference {gap}), so a share has no meaning."
    good = share.value >= goal
    near = " (nearer to the target than the noise)" if abs(share.value - goal) < 2 * share.error else ""
    start = "Met" if good else "MISSED"
    return good, f"{start}: '{row_label(name)}' closes {percent(share)} of the way from {span}{near}."
