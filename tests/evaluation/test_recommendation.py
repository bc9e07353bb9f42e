"""The first sentence of the report follows from the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from report_kit import LONGER, made_results
from trenchcoat.evaluation.report.recommendation import recommendation
from trenchcoat.evaluation.results import LengthScores, Results
from trenchcoat.evaluation.statistics import NOTHING, RowSums


def test_a_good_conversion_is_recommended_with_what_it_costs_and_recovers() -> None:
    text = recommendation(made_results())
    assert text.startswith(
        "Worth using for long texts of up to 2,048 tokens (the longest scored), also to quote and look things up"
    )
    assert "(13.3 % of the cache)" in text
    assert "391 KiB + 3.0 KiB a token (the teacher's: 22.5 KiB a token; at 32,768 tokens 96.4 MiB against 720" in text
    assert "on rows of 2,048 tokens) of copying." in text
    assert text.count("±") >= 4


@pytest.mark.parametrize(("changes", "start"), [
    ({"transfer_lora": (0.0, 0.12)}, "Not worth using, since past 2W it was not shown to be better than 'kept +"),
    ({"transfer_lora": (-0.2, -0.1)}, "Not to be used as it is, since it learned the kind of text it was trained on"),
    ({"transfer_lora": (-0.05, 0.0)}, "Not to be used as it is, since it learned the kind of text it was trained on "
                                      "(below 2W its loss is the teacher's minus 0.0"),
    ({"transfer_lora": (0.05, 0.02)}, "Not to be used as it is, since it lost some of what it knew"),
    ({"transfer_lora": (0.0, 0.2), "kept_window_sinks": (0.0, 0.25)},
     "Better than 'kept + window + sinks', which needs no training and no more memory, but hardly worth using"),
    ({"transfer_lora": (0.0, 0.06)}, "Usable for long texts of up to 2,048 tokens (the longest scored) whose gist"),
    ({"window_sinks": (0.0, 0.0)}, "Nothing can be said for or against it on this text"),
])  # fmt: skip
def test_each_reason_against_it_is_given(changes: dict[str, tuple[float, float]], start: str) -> None:
    assert recommendation(made_results(**changes)).startswith(start)


def test_copying_better_is_enough_where_other_text_is_no_worse() -> None:
    results = made_results()
    mine, rival = results.rows["transfer_lora"], results.rows["kept_window_sinks"]
    for other, start in ((rival, "Worth using to quote and look things up in older text; otherwise it is no better"),
                         (results.rows["window_sinks"], "Not worth using, since past 2W")):  # fmt: skip
        longer = {LONGER: replace(mine.longer[LONGER], far=other.longer[LONGER].far, near=rival.longer[LONGER].near)}
        results.rows["transfer_lora"] = replace(mine, far=other.far, near=rival.near, longer=longer)
        assert recommendation(results).startswith(start)


def test_it_is_recommended_from_the_length_where_it_was_better() -> None:
    results = made_results()
    mine, rival = results.rows["transfer_lora"], results.rows["kept_window_sinks"]
    results.rows["transfer_lora"] = replace(mine, far=rival.far, near=rival.near)
    assert recommendation(results).startswith(
        "Worth using for long texts of 2,048 tokens (the longest scored), also to quote"
    )
    results.rows["transfer_lora"] = replace(mine, far=results.rows["window_sinks"].far, near=rival.near)
    assert recommendation(results).startswith("Not worth using, since past 2W")


def test_without_kept_groups_the_window_is_the_rival() -> None:
    results = made_results(transfer_lora=(0.0, 0.35))
    del results.rows["kept_window_sinks"]
    text = recommendation(results)
    assert "better than 'window + sinks', which needs no training" in text
    assert "nothing of the softmax attention is kept" in text


def test_copying_less_than_the_untrained_row_is_a_reason_against_it() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    worse = RowSums([x + 2.0 * n for x, n in zip(mine.copy.sums, mine.copy.counts, strict=True)], mine.copy.counts)
    results.rows["transfer_lora"] = replace(mine, copy=worse)
    assert recommendation(results).startswith("Not worth using where older text has to be looked up, since it copies")


def test_it_is_recommended_up_to_the_length_where_it_was_better() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    long = mine.longer[LONGER]
    worse = RowSums([x + 0.2 * n for x, n in zip(long.far.sums, long.far.counts, strict=True)], long.far.counts)
    results.rows["transfer_lora"] = replace(mine, longer={LONGER: replace(long, far=worse)})
    assert recommendation(results).startswith("Worth using for long texts of up to 512 tokens, also to quote")


def test_without_copies_or_rows_the_sentence_says_what_is_missing() -> None:
    results = made_results()
    results.rows = {
        name: replace(scores, copy=NOTHING, longer={LONGER: LengthScores(scores.far, scores.near)})
        for name, scores in results.rows.items()
    }
    assert "whether it can look things up in them was not measured" in recommendation(results)
    assert recommendation(Results(window=4, seq_len=8)).startswith("Whether this model is worth using was not measured")
