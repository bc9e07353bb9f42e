"""Every answer follows from the numbers: synthetic results on both sides of each threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from report_kit import GOOD, made_results
from trenchcoat.evaluation.report.texts import bytes_text
from trenchcoat.evaluation.report.verdicts import Verdict, headline, verdicts
from trenchcoat.evaluation.results import DecodePoint, Results
from trenchcoat.evaluation.statistics import RowSums


def answer(results: Results, key: str) -> Verdict:
    return next(verdict for verdict in verdicts(results) if verdict.key == key)


def test_all_targets_met() -> None:
    found = verdicts(made_results())
    assert {verdict.outcome for verdict in found} == {"yes"}
    assert headline(found) == "Targets met: 3 of 3; answers: 11 YES, 0 NO, 0 not measured."


@pytest.mark.parametrize(("key", "changes", "words"), [
    ("beats_window_sinks", {"window_sinks": (0.0, 0.02)}, "does NOT beat 'window + sinks, untrained'"),
    ("beats_window_sinks_lora", {"window_sinks_lora": (0.0, 0.01)}, "does NOT beat 'window + sinks + LoRA'"),
    ("needs_far", {"far_off": (0.04, 0.02)}, "does NOT need its linear part"),
    ("beats_lora_only", {"lora_only": (0.0, 0.02)}, "does NOT beat 'LoRA only (no transfer)'"),
    ("has_structure", {"window_sinks": (0.0, -0.02)}, "no linear part can help on this text"),
    ("recalls", {"window_sinks_lora": (0.0, 0.01)}, "difference in points: -"),
    ("share_target", {"transfer_lora": (0.25, 0.3)}, "MISSED: 'transfer + LoRA' closes 8"),
    ("far_share_target", {"transfer_lora": (0.1, 0.11)}, "MISSED: 'transfer + LoRA' closes"),
    ("far_share_target", {"window_sinks": (0.0, -0.05)}, "MISSED: there is no clear gap to close"),
    ("order_target", {"lora_only": (0.0, 0.0)}, "MISSED (not better than LoRA only (no transfer))"),
    ("order_target", {"window_sinks": (0.0, 0.0)}, "MISSED (not better than window + sinks, untrained)"),
    ("order_target", {"window_sinks_lora": (0.0, 0.0)}, "MISSED (not better than window + sinks + LoRA)"),
])  # fmt: skip
def test_each_failure_is_reported(key: str, changes: dict[str, tuple[float, float]], words: str) -> None:
    verdict = answer(made_results(**changes), key)
    assert verdict.outcome == "no"
    assert words in verdict.sentence


def test_a_difference_within_the_noise_is_no() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    wobble = [0.3 if row % 2 else -0.2999 for row in range(len(mine.far.sums))]
    sums = [total + w * n for total, w, n in zip(mine.far.sums, wobble, mine.far.counts, strict=True)]
    results.rows["window_sinks"] = replace(mine, far=RowSums(sums, mine.far.counts))
    verdict = answer(results, "beats_window_sinks")
    assert verdict.outcome == "no"
    assert "within the noise" in verdict.sentence


def test_noise_too_large_to_tell_is_not_called_a_window_model() -> None:
    results = made_results()
    mine = results.rows["transfer_lora"]
    sums = [total + (60 if row % 2 else -40) for row, total in enumerate(mine.far.sums)]
    results.rows["far_off"] = replace(mine, far=RowSums(sums, mine.far.counts))
    verdict = answer(results, "needs_far")
    assert verdict.outcome == "no"
    assert "was NOT shown to need its linear part" in verdict.sentence
    assert "disguise" in answer(made_results(far_off=(0.04, 0.0)), "needs_far").sentence


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
    found = verdicts(results)
    assert {verdict.outcome for verdict in found} == {"not measured"}
    assert headline(found).startswith("Targets met: 0 of 3 (3 not measured)")
    assert {verdict.outcome for verdict in verdicts(Results(window=4, seq_len=8))} == {"not measured"}


def test_the_no_transfer_baseline_is_not_compared_with_itself() -> None:
    results = made_results({name: GOOD[name] for name in ("teacher", "untrained_swap", "lora_only", "window_sinks")})
    assert answer(results, "beats_lora_only").outcome == "not measured"
    assert answer(results, "order_target").outcome == "not measured"
    assert answer(results, "share_target").outcome == "no"


def test_rows_too_short_for_the_window_have_no_probe() -> None:
    results = made_results()
    nothing = RowSums([0.0] * 16, [0] * 16)
    results.rows = {name: replace(s, recall=nothing, recall_hits=nothing) for name, s in results.rows.items()}
    assert answer(results, "recalls").outcome == "not measured"


def test_a_growing_state_and_slow_decoding_are_reported() -> None:
    results = made_results()
    results.decode["student"] = [DecodePoint(n, 9.0, (8.9, 9.1), 1.0, 1000 * n) for n in (128, 2048)]
    assert answer(results, "constant_state").outcome == "no"
    assert answer(results, "constant_state").sentence.startswith("NOT constant: 125 KiB to 2.0 MiB")
    assert answer(results, "decodes_faster").sentence.startswith("SLOWER: 9.00 ms a token against 4.28 ms")
    results.decode["student"] = [DecodePoint(n, 4.2, (4.0, 4.5), 1.0, 1000) for n in (128, 2048)]
    assert answer(results, "decodes_faster").outcome == "no"
    assert "NOT faster" in answer(results, "decodes_faster").sentence


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (8 << 20, "8.0 MiB"), (3 << 40, "3072 GiB")]
)
def test_byte_sizes_are_readable(count: int, text: str) -> None:
    assert bytes_text(count) == text
