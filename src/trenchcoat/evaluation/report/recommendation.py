"""The first sentence of a report: what was kept, what it costs, what it recovers, and whether to use it.

The rule. A conversion is worth using for the lengths at which, past 2W, it is better than the row that keeps the same
groups and trains nothing (by more than two standard errors, with the shift below 2W taken off where that lowers it), if
it is worse at no shorter one and copies no worse, if its shift below 2W is within 0.03 nats, and if it closes half of
the gap past 2W. To look things up in older text it must close 90 % of the gap in copying; one that copies better, and
is no worse on other text, is worth using for that.
"""

from __future__ import annotations

import math

from trenchcoat.evaluation.columns import percent
from trenchcoat.evaluation.report.texts import bytes_text, signed
from trenchcoat.evaluation.report.verdicts import COPY_LIMIT, LONG_CONTEXT, SHIFT_LIMIT, better, cache_text, compare
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.rows import KEPT_WINDOW, TEACHER, WINDOW, row_label
from trenchcoat.evaluation.statistics import Estimate, paired_difference

FAR_LIMIT = 0.5
"""Share of what lies past 2W from which a model counts as one that reads it."""


def recommendation(results: Results) -> str:
    """One sentence: the advice, then the figures that it follows from."""
    name, rival = results.converted(), results.untrained_rival()
    if name is None or rival is None or TEACHER not in results.rows or WINDOW not in results.rows:
        return (
            "Whether this model is worth using was not measured: that takes the teacher, a converted model and the "
            "untrained rows on the same text."
        )
    figures = f"{_kept(results)}{_cost(results, name)}, and it recovers {_gains(results, name)}"
    return f"{_advice(results, name, rival)}: {figures}."


def _advice(results: Results, name: str, rival: str) -> str:
    """What to do with the model."""
    if results.far_closed(name) is None:
        return "Nothing can be said for or against it on this text, where the teacher gains nothing clear past 2W"
    instead = f"'{row_label(rival)}', which needs no training and no more memory"
    text, copying = _text_gains(results, name, rival), _copying(results, name, rival)
    worse = next((tokens for tokens, gain in text.items() if gain.clear and gain.value < 0), math.inf)
    shown = [tokens for tokens, gain in text.items() if better(gain) and tokens < worse]
    copies_less = any(one.clear and one.value < 0 for one in copying)
    shift = results.shift(name)
    copies = [share for share in (results.copy_closed(name, f) for f in results.factors()) if share is not None]
    quotes = bool(copies) and min(share.value for share in copies) >= COPY_LIMIT
    copies_better = quotes and not copies_less and any(map(better, copying))
    shifted = shift is not None and abs(shift.value) > SHIFT_LIMIT
    if not shown and copies_better and worse == math.inf and not shifted:
        return f"Worth using to quote and look things up in older text; otherwise it is no better than {instead}"
    if not shown:
        use = "use that (student.name=window_sinks)"
        return f"Not worth using, since past 2W it was not shown to be better than {instead}: {use}"
    if copies_less:
        return f"Not worth using where older text has to be looked up, since it copies less than {instead}"
    if shift is not None and shifted:
        why = "learned the kind of text it was trained on" if shift.value < 0 else "lost some of what it knew"
        return f"Not to be used as it is, since it {why} (below 2W its loss is the teacher's {_plus(shift)} nats)"
    factor = shown[0] // results.seq_len
    share = results.far_closed(name, factor, corrected=True) or results.far_closed(name, factor)
    if share is not None and share.value < FAR_LIMIT:
        return f"Better than {instead}, but hardly worth using, since most of what lies past 2W is lost"
    limit = _limits(shown, list(text))
    if not copies:
        return f"Usable for long texts{limit}, though whether it can look things up in them was not measured"
    if not quotes:
        return f"Usable for long texts{limit} whose gist is enough, but not to quote or look things up past the window"
    return f"Worth using for long texts{limit}, also to quote and look things up in them"


def _plus(shift: Estimate) -> str:
    return f"{'plus' if shift.value > 0 else 'minus'} {signed(Estimate(abs(shift.value), shift.error))}"


def _copying(results: Results, name: str, rival: str) -> list[Estimate]:
    """Loss of the untrained row minus that of the model on copied text, at each length scored."""
    pairs = [tuple(results.rows[row].at(factor) for row in (name, rival)) for factor in results.factors()]
    return [
        paired_difference(its.copy, mine.copy)
        for mine, its in pairs
        if mine is not None and its is not None and mine.copy.count and its.copy.count
    ]


def _text_gains(results: Results, name: str, rival: str) -> dict[int, Estimate]:
    """Tokens of a row -> what the model gains past 2W on the untrained row, at each length scored."""
    return {
        factor * results.seq_len: compare(results, name, rival, factor)
        for factor in results.factors()
        if results.rows[name].at(factor) is not None and results.rows[rival].at(factor) is not None
    }


def _limits(shown: list[int], scored: list[int]) -> str:
    """The lengths at which it was shown to be better, of those ``scored``: longer texts can be worse than no training
    (docs/RESULTS.md), so nothing is said of them."""
    ends = f"{shown[-1]:,} tokens" + (" (the longest scored)" if shown[-1] == scored[-1] else "")
    if shown[0] == scored[0]:
        return f" of up to {ends}"
    return f" of {ends}" if len(shown) == 1 else f" of {shown[0]:,} to {ends}"


def _kept(results: Results) -> str:
    """What keeps softmax attention."""
    groups, kept = int(results.model.get("groups", 0)), int(results.model.get("kept groups", 0))
    if KEPT_WINDOW not in results.rows:
        return "nothing of the softmax attention is kept"
    if not groups:
        return "some groups keep softmax attention"
    return f"{kept} of {groups} key/value groups keep softmax attention ({100 * kept / groups:.1f} % of the cache)"


def _cost(results: Results, name: str) -> str:
    """What the cache takes."""
    mine, its = results.rows[name].cache, results.rows[TEACHER].cache
    if mine is None or its is None:
        return ""
    small, large = mine.at(LONG_CONTEXT), its.at(LONG_CONTEXT)
    return (
        f", a sequence takes {cache_text(mine)} (the teacher's: {cache_text(its)}; at {LONG_CONTEXT:,} tokens "
        f"{bytes_text(small)} against {bytes_text(large)})"
    )


def _gains(results: Results, name: str) -> str:
    """What is recovered, at the shortest and the longest rows."""
    return " and ".join(
        (
            _at_ends(results, [results.far_closed(name, f, corrected=True) or results.far_closed(name, f)
                               for f in results.factors()]) + " of what lies past 2W",
            _at_ends(results, [results.copy_closed(name, f) for f in results.factors()]) + " of copying",
        )
    )  # fmt: skip


def _at_ends(results: Results, shares: list[Estimate | None]) -> str:
    known = [
        (factor * results.seq_len, share)
        for factor, share in zip(results.factors(), shares, strict=True)
        if share is not None and math.isfinite(share.value)
    ]
    if not known:
        return "an unknown share"
    (first, share), (last, other) = known[0], known[-1]
    return percent(share) + (f" ({percent(other)} on rows of {last:,} tokens)" if last != first else "")
