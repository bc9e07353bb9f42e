"""Every answer follows from the numbers: synthetic results on both sides of each threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from report_kit import GOOD, LONGER, made_results
from trenchcoat.evaluation.report.texts import bytes_text
from trenchcoat.evaluation.report.verdicts import Verdict, cache_text, compare, headline, verdicts
from trenchcoat.evaluation.results import CacheSize, DecodePoint, Results
from trenchcoat.evaluation.statistics import NOTHING, RowSums


def answer(results: Results, key: str) -> Verdict:
    return next(verdict for verdict in verdicts(results) if verdict.key == key)


def test_every_answer_can_be_yes() -> None:
    found = verdicts(made_results())
    assert {verdict.outcome for verdict in found} == {"yes"}
    assert headline(found) == "Answers: 13 YES, 0 NO, 0 not measured."


@pytest.mark.parametrize(("key", "changes", "words"), [
    ("beats_window_sinks", {"window_sinks": (0.0, 0.01)}, "does NOT beat 'window + sinks'"),
    ("beats_kept_window_sinks", {"kept_window_sinks": (0.0, 0.01)}, "does NOT beat 'kept + window + sinks'"),
    ("beats_window_sinks_lora", {"window_sinks_lora": (0.0, 0.01)}, "does NOT beat 'window+sinks, stage 2'"),
    ("beats_constant", {"constant": (0.0, 0.01)}, "does NOT beat 'nothing kept, stage 2'"),
    ("needs_far", {"far_off": (0.0, 0.0)}, "does NOT need its linear part"),
    ("beats_lora_only", {"lora_only": (0.0, 0.01)}, "does NOT beat 'no transfer, stage 2'"),
    ("beats_at_length", {"kept_window_sinks": (0.0, 0.01)}, "On rows of 2,048 tokens it does NOT beat 'kept"),
    ("has_structure", {"window_sinks": (0.0, -0.02)}, "nothing can be recovered on this text"),
    ("recalls", {"kept_window_sinks": (0.0, 0.0)}, "difference in points: -"),
    ("copies", {"transfer_lora": (0.0, 0.06)}, "it closes 80."),
    ("no_shift", {"transfer_lora": (-0.1, 0.02)}, "which looks like recovered context"),
    ("no_shift", {"transfer_lora": (0.1, 0.02)}, "damaged what the model knew"),
])  # fmt: skip
def test_each_failure_is_reported(key: str, changes: dict[str, tuple[float, float]], words: str) -> None:
    verdict = answer(made_results(**changes), key)
    assert verdict.outcome == "no"
    assert words in verdict.sentence


def test_a_row_that_was_not_asked_for_is_no_question() -> None:
    results = made_results()
    del results.rows["kept_window_sinks"]
    assert "beats_kept_window_sinks" not in {verdict.key for verdict in verdicts(results)}
    assert "'window + sinks'" in answer(results, "recalls").sentence


def test_learning_the_kind_of_text_does_not_count_as_recovered_context() -> None:
    """Far below the teacher's window row, but only because everything is 0.2 nats lower."""
    results = made_results(transfer_lora=(-0.2, -0.1))
    assert compare(results, "transfer_lora", "kept_window_sinks").value == pytest.approx(0.0, abs=0.01)
    assert answer(results, "beats_kept_window_sinks").outcome == "no"
    damaged = made_results(transfer_lora=(0.3, 0.2))  # 0.1 better than its surroundings, worse than the row
    assert compare(damaged, "transfer_lora", "kept_window_sinks").value == pytest.approx(-0.1, abs=0.02)


def test_a_difference_within_the_noise_is_no() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    wobble = [0.3 if row % 2 else -0.2999 for row in range(len(mine.far.sums))]
    sums = [total + w * n for total, w, n in zip(mine.far.sums, wobble, mine.far.counts, strict=True)]
    results.rows["window_sinks"] = replace(mine, far=RowSums(sums, mine.far.counts))
    verdict = answer(results, "beats_window_sinks")
    assert verdict.outcome == "no"
    assert "within the noise" in verdict.sentence


def test_noise_too_large_to_tell_is_not_called_useless() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    sums = [total + (60 if row % 2 else -40) for row, total in enumerate(mine.far.sums)]
    results.rows["far_off"] = replace(mine, far=RowSums(sums, mine.far.counts))
    verdict = answer(results, "needs_far")
    assert verdict.outcome == "no"
    assert "was NOT shown to need its linear part" in verdict.sentence
    assert "comes from elsewhere" in answer(made_results(far_off=(0.0, 0.0)), "needs_far").sentence


def test_a_far_part_with_a_tiny_effect_is_not_needed() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    sums = [total + 0.002 * n for total, n in zip(mine.far.sums, mine.far.counts, strict=True)]
    sums[0] += 1e-3
    results.rows["far_off"] = replace(mine, far=RowSums(sums, mine.far.counts))
    verdict = answer(results, "needs_far")
    assert verdict.outcome == "no"
    assert "hardly needs its linear part" in verdict.sentence


def test_worse_is_written_in_capitals() -> None:
    assert "HIGHER by" in answer(made_results(window_sinks=(0.0, 0.0)), "beats_window_sinks").sentence


def test_a_loss_that_is_not_a_number_beats_nothing() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    results.rows["transfer_lora"] = replace(mine, far=RowSums([float("nan")] * len(mine.far.counts), mine.far.counts))
    verdict = answer(results, "beats_window_sinks")
    assert verdict.outcome == "no"
    assert "not a number" in verdict.sentence


def test_missing_measurements_are_reported_and_count_as_no_success() -> None:
    results = made_results({"teacher": GOOD["teacher"], "transfer_lora": GOOD["transfer_lora"]})
    results.decode = {}
    results.rows = {name: replace(s, near=NOTHING, cache=None) for name, s in results.rows.items()}
    found = verdicts(results)
    assert {verdict.outcome for verdict in found} == {"not measured"}
    assert headline(found) == "Answers: 0 YES, 0 NO, 11 not measured."
    assert {verdict.outcome for verdict in verdicts(Results(window=4, seq_len=8))} == {"not measured"}


def test_the_no_transfer_baseline_is_not_compared_with_itself() -> None:
    results = made_results({name: GOOD[name] for name in ("teacher", "untrained_swap", "lora_only", "window_sinks")})
    assert answer(results, "beats_lora_only").outcome == "not measured"
    assert answer(results, "copies").outcome == "no"


def test_rows_too_short_for_the_window_have_no_probe() -> None:
    results = made_results()
    nothing = RowSums([0.0] * 16, [0] * 16)
    results.rows = {name: replace(s, recall=nothing, recall_hits=nothing) for name, s in results.rows.items()}
    assert answer(results, "recalls").outcome == "not measured"


def test_a_failure_at_the_longest_rows_is_not_hidden_by_the_shorter_ones() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    long = mine.longer[LONGER]
    worse = RowSums([x + 0.2 * n for x, n in zip(long.far.sums, long.far.counts, strict=True)], long.far.counts)
    results.rows["transfer_lora"] = replace(mine, longer={LONGER: replace(long, far=worse)})
    assert answer(results, "beats_kept_window_sinks").outcome == "yes"
    assert answer(results, "beats_at_length").outcome == "no"
    results.rows = {name: replace(scores, longer={}) for name, scores in results.rows.items()}
    assert answer(results, "beats_at_length").outcome == "not measured"


def test_a_cache_as_large_as_the_teachers_and_slow_decoding_are_reported() -> None:
    results = made_results()
    assert "391 KiB + 3.0 KiB a token; the teacher 22.5 KiB a token" in answer(results, "smaller_cache").sentence
    results.rows["transfer_lora"] = replace(results.rows["transfer_lora"], cache=CacheSize(10**6, 23_040))
    assert answer(results, "smaller_cache").outcome == "no"
    results.decode["student"] = [DecodePoint(n, 9.0, (8.9, 9.1), 1.0, 1000 * n) for n in (128, 2048)]
    assert answer(results, "decodes_faster").sentence.startswith("SLOWER: 9.00 ms a token against 4.28 ms")
    results.decode["student"] = [DecodePoint(n, 4.2, (4.0, 4.5), 1.0, 1000) for n in (128, 2048)]
    assert answer(results, "decodes_faster").outcome == "no"
    assert "NOT faster" in answer(results, "decodes_faster").sentence


def test_a_cache_in_words_and_at_any_length() -> None:
    cache = CacheSize(1024, 512, [(2048, 100), (1024, 100)])
    assert cache_text(cache) == "1.0 KiB + 512 B a token + 3.0 KiB a token up to 100 tokens"
    assert cache.at(10) == 1024 + 10 * (512 + 3072)
    assert cache.at(1000) == 1024 + 1000 * 512 + 100 * 3072
    assert cache_text(CacheSize(5, 0)) == "5 B"


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (8 << 20, "8.0 MiB"), (3 << 40, "3072 GiB")]
)
def test_byte_sizes_are_readable(count: int, text: str) -> None:
    assert bytes_text(count) == text
