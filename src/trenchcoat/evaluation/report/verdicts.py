"""What the numbers of an evaluation say, in plain sentences; nothing here is chosen by hand for a run.

A comparison is answered "yes" only when the difference is in favour **and** more than two standard errors of the
paired difference away from zero; a difference within the noise is answered "no", because it was not shown. The
reason for the far-part questions: published hybrids of window and linear attention were found to bypass their
linear part (arXiv 2510.05901).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from trenchcoat.evaluation.results import (
    FAR_OFF,
    LORA_ONLY,
    ROW_LABELS,
    TEACHER,
    UNTRAINED,
    WINDOW_SINKS,
    WINDOW_SINKS_LORA,
    Difference,
    Results,
    RowSums,
    paired_difference,
)

SHARE_TARGET = 0.9
"""Target: share of the loss gap between the untrained swap and the teacher, over all tokens."""
FAR_SHARE_TARGET = 0.5
"""Target: share of the loss gap between the better window + sinks row and the teacher, on tokens past 2W."""
LEAST_EFFECT = 0.005
"""Nats (half a per cent of perplexity) that the far part must be worth before it counts as needed."""

Outcome = Literal["yes", "no", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """One question about the conversion and its answer."""

    key: str
    question: str
    outcome: Outcome
    sentence: str
    """The answer with its numbers."""
    target: bool = False
    """True for the targets the project set itself."""


def label(name: str) -> str:
    """The row's name as readers see it."""
    return ROW_LABELS.get(name, name)


def signed(difference: Difference) -> str:
    """``0.021 ± 0.004`` (the error is one standard error), with more digits when the noise is smaller than those."""
    if not math.isfinite(difference.error):
        return f"{difference.value:.3f} (noise unknown)"
    digits = 3 if difference.error >= 0.002 else 4
    return f"{difference.value:.{digits}f} ± {difference.error:.{digits}f}"


def percent(share: Difference) -> str:
    """``93.1 % ± 0.8``; without a noise when it is known to be none, as for the two ends of a gap."""
    digits = 1 if abs(share.value) < 2 and share.error != 0 else 0
    noise = f" ± {100 * share.error:.{digits}f}" if math.isfinite(share.error) and share.error != 0 else ""
    return f"{100 * share.value:.{digits}f} %{noise}"


def verdicts(results: Results) -> list[Verdict]:
    """All questions in the order of the report; those whose rows are missing are "not measured"."""
    return [
        _order_target(results),
        _share_target(
            results,
            "share_target",
            f"Target: close at least {SHARE_TARGET:.0%} of the gap from the untrained swap to the teacher, all tokens",
            SHARE_TARGET,
            UNTRAINED,
            results.share_closed,
            lambda name: results.rows[name].all,
        ),
        _share_target(
            results,
            "far_share_target",
            f"Target: close at least {FAR_SHARE_TARGET:.0%} of the gap from window + sinks to the teacher, past 2W",
            FAR_SHARE_TARGET,
            results.best_window_sinks(),
            results.far_share_closed,
            lambda name: results.rows[name].far,
        ),
        _has_structure(results),
        _beats(
            results, WINDOW_SINKS, "beats_window_sinks", "Does it beat a plain window with sinks, without training?"
        ),
        _beats(
            results, WINDOW_SINKS_LORA, "beats_window_sinks_lora", "Does it beat window + sinks with the same LoRA?"
        ),
        _needs_far(results),
        _beats(results, LORA_ONLY, "transfer_helps", "Is attention transfer worth having, against LoRA alone?"),
        _recalls(results),
        _constant_state(results),
        _decodes_faster(results),
    ]


def headline(found: Sequence[Verdict]) -> str:
    """One sentence over all answers: targets met, and how many answers are a NO."""
    targets = [verdict.outcome for verdict in found if verdict.target]
    against, unknown = (sum(v.outcome == outcome for v in found) for outcome in ("no", "not measured"))
    parts = [f"Targets met: {targets.count('yes')} of {len(targets)}"]
    parts[0] += f" ({targets.count('not measured')} not measured)" if "not measured" in targets else ""
    parts.append(f"answers: {len(found) - against - unknown} YES, {against} NO, {unknown} not measured")
    return "; ".join(parts) + "."


def _missing(key: str, question: str, what: str, target: bool = False) -> Verdict:
    return Verdict(key, question, "not measured", f"Not measured: {what}.", target)


def _answer(good: bool) -> Outcome:
    return "yes" if good else "no"


def _better(difference: Difference) -> bool:
    return difference.clear and difference.value > 0


def _compare(results: Results, name: str, other: str) -> Difference:
    """Loss of ``other`` minus loss of ``name`` past 2W: positive when ``name`` is better."""
    return paired_difference(results.rows[other].far, results.rows[name].far)


def _in_words(difference: Difference) -> str:
    """How the loss compares, with its noise."""
    if not math.isfinite(difference.value):
        return "a loss is not a number"
    if not difference.clear:
        return f"the loss difference of {signed(difference)} nats (above 0: in favour) is within the noise"
    side = "lower" if difference.value > 0 else "HIGHER"
    return f"the loss is {side} by {signed(Difference(abs(difference.value), difference.error))} nats"


def _has_structure(results: Results) -> Verdict:
    key, question = "has_structure", "Is there anything beyond the window to carry?"
    window = results.best_window_sinks()
    if window is None or TEACHER not in results.rows:
        return _missing(key, question, "this needs the teacher and a window + sinks row")
    gap = _compare(results, TEACHER, window)
    good = _better(gap) and gap.value >= LEAST_EFFECT
    text = f"Past 2W, the teacher against the better window + sinks row ({label(window)}): {_in_words(gap)}."
    if not good:
        text += " Without such a gap no linear part can show its worth on this text."
    return Verdict(key, question, _answer(good), text)


def _beats(results: Results, other: str, key: str, question: str) -> Verdict:
    name = results.converted()
    if name is None or other not in results.rows or name == other:
        return _missing(key, question, f"this needs a converted model and the row '{label(other)}'")
    difference = _compare(results, name, other)
    good = _better(difference)
    verb = "beats" if good else "does NOT beat"
    mine, its = results.rows[name].far_perplexity, results.rows[other].far_perplexity
    text = (
        f"'{label(name)}' {verb} '{label(other)}' on tokens past 2W: perplexity {mine:.3f} against {its:.3f}; "
        f"{_in_words(difference)}."
    )
    return Verdict(key, question, _answer(good), text)


def _needs_far(results: Results) -> Verdict:
    key, question = "needs_far", "Does it need its linear (far) part?"
    name = results.converted()
    if name is None or FAR_OFF not in results.rows:
        return _missing(key, question, "this needs the converted model with its far part switched off")
    difference = _compare(results, name, FAR_OFF)
    good = _better(difference) and difference.value >= LEAST_EFFECT
    mine, its = results.rows[name].far_perplexity, results.rows[FAR_OFF].far_perplexity
    numbers = f"perplexity past 2W is {mine:.3f} with it and {its:.3f} without; {_in_words(difference)}"
    if good:
        text = f"'{label(name)}' needs its linear part: {numbers}."
    elif _better(difference):
        text = f"'{label(name)}' hardly needs its linear part: {numbers}, under the {LEAST_EFFECT} that would count."
    elif difference.value + 2 * difference.error < LEAST_EFFECT:
        text = f"'{label(name)}' does NOT need its linear part: {numbers}. It is a window model in disguise."
    else:
        text = f"'{label(name)}' was NOT shown to need its linear part: {numbers}, which is too large to tell."
    return Verdict(key, question, _answer(good), text)


def _recalls(results: Results) -> Verdict:
    key, question = "recalls", "Does it recall tokens from beyond the window better than window + sinks?"
    name, window = results.converted(), results.best_window_sinks()
    if name is None or window is None:
        return _missing(key, question, "this needs a converted model and a window + sinks row")
    mine, its = results.rows[name], results.rows[window]
    if not mine.recall.count:
        return _missing(key, question, "the rows hold no recall probe (they are too short for the window)")
    hits = paired_difference(mine.recall_hits, its.recall_hits)
    good = _better(hits)
    teacher = results.rows.get(TEACHER)
    beside = f"; the teacher's is {teacher.recall_hits.mean:.1%}" if teacher else ""
    points = percent(hits).replace(" %", "") + ("" if hits.clear else ", within the noise")
    text = (
        f"On {mine.recall.count} probes the accuracy of '{label(name)}' is {mine.recall_hits.mean:.1%} and that of "
        f"'{label(window)}' {its.recall_hits.mean:.1%} (difference in points: {points}){beside}."
    )
    return Verdict(key, question, _answer(good), text)


def _constant_state(results: Results) -> Verdict:
    key, question = "constant_state", "Is the decoding state of constant size?"
    student, teacher = results.decode.get("student"), results.decode.get("teacher")
    if not student or len(student) < 2:
        return _missing(key, question, "decoding was not timed at two context lengths")
    sizes = sorted({point.cache_bytes for point in student})
    good = len(sizes) == 1
    span = bytes_text(sizes[0]) if good else f"{bytes_text(sizes[0])} to {bytes_text(sizes[-1])}"
    text = f"{'Constant' if good else 'NOT constant'}: {span}"
    text += f" from {student[0].context:,} to {student[-1].context:,} tokens of context."
    if teacher:
        last = teacher[-1]
        text += f" The teacher's cache holds {bytes_text(last.cache_bytes)} at {last.context:,} tokens."
    return Verdict(key, question, _answer(good), text)


def _decodes_faster(results: Results) -> Verdict:
    key, question = "decodes_faster", "Does it decode faster than the teacher at the longest context measured?"
    both = {p.context: p for p in results.decode.get("teacher", [])}
    pairs = [(both[p.context], p) for p in results.decode.get("student", []) if p.context in both]
    if not pairs:
        return _missing(key, question, "decoding was not timed for both models")
    teacher, student = max(pairs, key=lambda pair: pair[0].context)
    good = student.ms_quartiles[1] < teacher.ms_quartiles[0]
    times = f"{student.ms_per_token:.2f} ms a token against {teacher.ms_per_token:.2f} ms at {student.context:,} tokens"
    if good:
        text = f"Faster: {times}."
    elif student.ms_quartiles[0] > teacher.ms_quartiles[1]:
        text = f"SLOWER: {times}. There the fixed work of a step still outweighs attention over the context."
    else:
        text = f"NOT faster: {times}; the spread of both overlaps."
    return Verdict(key, question, _answer(good), text)


def _order_target(results: Results) -> Verdict:
    key = "order_target"
    question = "Target: past 2W, better than LoRA only and than both window + sinks rows"
    name, others = results.converted(), (LORA_ONLY, WINDOW_SINKS, WINDOW_SINKS_LORA)
    absent = [label(other) for other in others if other not in results.rows]
    if name is None or name == LORA_ONLY or absent:
        return _missing(
            key, question, "this needs a transferred model and " + ", ".join(map(label, others)), target=True
        )
    found = {other: _compare(results, name, other) for other in others}
    lost = [label(other) for other, difference in found.items() if not _better(difference)]
    parts = "; ".join(f"against '{label(other)}' {_in_words(difference)}" for other, difference in found.items())
    start = f"MISSED (not better than {', '.join(lost)})" if lost else "Met"
    return Verdict(key, question, _answer(not lost), f"{start}: {parts}.", target=True)


def _share_target(
    results: Results,
    key: str,
    question: str,
    goal: float,
    bottom: str | None,
    share_of: Callable[[str], Difference | None],
    tokens: Callable[[str], RowSums],
) -> Verdict:
    name = results.converted()
    if name is None or bottom not in results.rows or TEACHER not in results.rows:
        return _missing(
            key, question, "this needs the teacher, the converted model and the row the gap starts from", True
        )
    share = share_of(name)
    losses = f"loss {tokens(bottom).mean:.4f} ('{label(bottom)}') to {tokens(TEACHER).mean:.4f} (teacher)"
    if share is None:
        gap = paired_difference(tokens(bottom), tokens(TEACHER))
        text = (
            f"MISSED: there is no clear gap to close ({losses}, difference {signed(gap)}), so a share has no meaning."
        )
        return Verdict(key, question, "no", text, target=True)
    good = share.value >= goal
    near = " (nearer to the target than the noise)" if abs(share.value - goal) < 2 * share.error else ""
    text = f"{'Met' if good else 'MISSED'}: '{label(name)}' closes {percent(share)} of the way from {losses}{near}."
    return Verdict(key, question, _answer(good), text, target=True)


def bytes_text(count: int) -> str:
    """``1.5 MiB``."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
