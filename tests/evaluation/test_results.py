"""Numbers, their standard errors, and the results file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from report_kit import made_results
from trenchcoat.evaluation.results import DecodePoint, Results
from trenchcoat.evaluation.statistics import NOTHING, Estimate, RowSums, gap_closed, paired_difference


def row_sums(means: list[float], count: int = 50) -> RowSums:
    return RowSums([mean * count for mean in means], [count] * len(means))


def test_mean_is_over_tokens_not_rows() -> None:
    assert RowSums([10.0, 1.0], [90, 10]).mean == pytest.approx(0.11)
    assert math.isnan(RowSums([0.0], [0]).mean)


def test_the_error_of_a_mean_over_equal_rows_is_its_standard_error() -> None:
    noise = random.Random(0)
    means = [noise.gauss(3, 0.5) for _ in range(200)]
    centre = sum(means) / len(means)
    expected = math.sqrt(sum((x - centre) ** 2 for x in means) / (len(means) - 1) / len(means))
    assert row_sums(means).error == pytest.approx(expected, rel=1e-9)


def test_the_noise_of_rows_of_unequal_length_by_hand() -> None:
    """Means without each row: 4 (of 3 and 5), 5 / 3 (of 2 and 1), 2.25 (of 1 and 3)."""
    found = RowSums([2.0, 6.0, 3.0, 0.0], [2, 1, 1, 0])
    without = [9 / 2, 5 / 3, 8 / 3]
    centre = sum(without) / 3
    assert found.mean == 11 / 4
    assert found.error == pytest.approx(math.sqrt(2 / 3 * sum((x - centre) ** 2 for x in without)))
    assert row_sums([1.0, 2.0, 4.0]).error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))


def test_nothing_counted_is_not_a_number() -> None:
    assert math.isnan(NOTHING.estimate.value)
    assert math.isnan(NOTHING.estimate.error)
    assert math.isnan(RowSums([0.0, 0.0], [0, 0]).estimate.value)


def test_noise_shared_by_both_models_cancels() -> None:
    noise = random.Random(0)
    text = [noise.gauss(3, 1) for _ in range(40)]
    a, b = row_sums([x + 0.02 + noise.gauss(0, 0.01) for x in text]), row_sums(text)
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(0.02, abs=0.005)
    assert difference.error < 0.003 < a.error
    assert difference.clear
    assert not paired_difference(b, row_sums([x + noise.gauss(0, 0.5) for x in text])).clear


def test_one_row_of_text_gives_no_noise_and_nothing_is_clear() -> None:
    difference = paired_difference(row_sums([2.0]), row_sums([1.0]))
    assert difference.value == 1.0
    assert math.isnan(difference.error)
    assert not difference.clear


def test_scores_of_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="different tokens: 100 tokens in 2 rows against 50 in 1"):
        paired_difference(row_sums([1.0, 2.0]), row_sums([1.0]))


def test_share_of_a_gap() -> None:
    text = [2.0, 2.5, 3.0, 3.5]
    top, bottom = row_sums(text), row_sums([x + 1 for x in text])
    for excess, expected in ((1.0, 0.0), (0.25, 0.75), (0.0, 1.0), (-0.1, 1.1), (1.5, -0.5)):
        share = gap_closed(row_sums([x + excess for x in text]), bottom, top)
        assert share is not None
        assert share.value == pytest.approx(expected)
    assert gap_closed(top, bottom, top) == Estimate(1.0, 0.0)


def test_no_share_of_a_gap_within_the_noise() -> None:
    text = [2.0, 2.5, 3.0, 3.5]
    wobble = [0.2, -0.2, 0.21, -0.2]
    near = row_sums([x + w for x, w in zip(text, wobble, strict=True)])
    assert gap_closed(row_sums(text), near, row_sums(text)) is None
    worse = row_sums([x + 1 for x in text])
    assert gap_closed(row_sums(text), row_sums(text), worse) is None  # the "top" is below the "bottom"


def test_share_of_the_gap_carries_the_noise_of_its_ends() -> None:
    noise = random.Random(1)
    text = [noise.gauss(3, 0.5) for _ in range(30)]
    bottom, top = row_sums([x + 1 + noise.gauss(0, 0.2) for x in text]), row_sums(text)
    share = gap_closed(row_sums([x + 0.1 + noise.gauss(0, 0.2) for x in text]), bottom, top)
    assert share is not None
    assert 0.01 < share.error < 0.1


def test_the_untrained_window_without_kept_groups_is_the_reference() -> None:
    results = made_results()
    assert results.far_closed("window_sinks") == Estimate(0.0, 0.0)
    assert results.far_closed("teacher") == Estimate(1.0, 0.0)
    found = {name: results.far_closed(name, factor) for name in ("transfer_lora",) for factor in (1, 4)}
    assert found["transfer_lora"] is not None
    assert found["transfer_lora"].value == pytest.approx(1 - 0.02 / 0.3, abs=0.02)
    assert results.far_closed("transfer_lora", 2) is None  # not scored at that length
    assert results.copy_closed("kept_window_sinks") is not None
    assert results.factors() == [1, 4]
    assert results.untrained_rival() == "kept_window_sinks"
    del results.rows["kept_window_sinks"]
    assert results.untrained_rival() == "window_sinks"
    del results.rows["teacher"]
    assert results.far_closed("transfer_lora") is None
    assert results.shift("transfer_lora") is None


def test_a_share_is_corrected_by_the_shift_below_2w_by_hand() -> None:
    """Loss past 2W: teacher 2, bottom 3, row 2.1, but the row is also 0.2 below the teacher where it is the teacher:
    without that it would have lost 0.3 of 1."""
    text = [1.9, 2.0, 2.1]
    top, bottom, row = (row_sums([x + more for x in text]) for more in (0.0, 1.0, 0.1))
    near_top, near_row = (row_sums([x + more for x in (2.5, 2.6, 2.7)], count=30) for more in (0.0, -0.2))
    plain, corrected = gap_closed(row, bottom, top), gap_closed(row, bottom, top, (near_row, near_top))
    assert plain is not None
    assert corrected is not None
    assert plain.value == pytest.approx(0.9)
    assert corrected.value == pytest.approx(0.7)
    assert corrected.error == pytest.approx(0.0, abs=1e-9)


def test_a_teacher_that_only_learned_the_text_recovers_nothing_more() -> None:
    results = made_results()
    plain = results.far_closed("teacher_lora")
    corrected = results.far_closed("teacher_lora", corrected=True)
    shift = results.shift("teacher_lora")
    assert plain is not None
    assert corrected is not None
    assert shift is not None
    assert plain.value > 1.3
    assert corrected.value == pytest.approx(1.0, abs=0.02)
    assert shift.value == pytest.approx(-0.1, abs=0.01)
    assert results.shift("teacher") is None


def test_converted_is_the_last_stage_trained() -> None:
    results = made_results()
    assert results.converted() == "transfer_lora"
    del results.rows["transfer_lora"]
    assert results.converted() == "transfer_only"
    assert Results(window=4, seq_len=8).converted() is None


def test_rows_are_ordered_and_unknown_names_come_last() -> None:
    results = made_results()
    results.rows = {"mine": results.rows["teacher"], **dict(reversed(results.rows.items()))}
    names = [name for name, _ in results.ordered_rows()]
    assert names[0] == "teacher"
    assert names[-1] == "mine"


def test_saved_is_loaded(tmp_path: Path) -> None:
    results = made_results()
    results.save(tmp_path / "results.json")
    loaded = Results.load(tmp_path / "results.json")
    assert loaded.rows == results.rows
    assert loaded.decode == results.decode
    assert loaded.samples == results.samples
    assert loaded.recipe == results.recipe
    assert [s.name for s in loaded.stages] == ["transfer", "lora"]
    assert math.isnan(loaded.stages[1].best_loss)
    assert loaded.to_dict() == results.to_dict()


def test_numbers_that_are_not_finite_survive_as_null(tmp_path: Path) -> None:
    results = made_results()
    broken = results.rows["untrained_swap"]
    broken.position_loss[3] = math.nan
    broken.all.sums[0] = math.inf
    results.save(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert math.isnan(Results.load(tmp_path / "results.json").rows["untrained_swap"].all.mean)


def test_the_file_has_a_summary_of_each_row(tmp_path: Path) -> None:
    made_results().save(tmp_path / "results.json")
    summary = json.loads((tmp_path / "results.json").read_text())["rows"]["transfer_lora"]["summary"]
    assert summary["closed_past_2w"]["value"] == pytest.approx(0.93, abs=0.02)
    assert summary["closed_past_2w_4x"]["value"] == pytest.approx(0.93, abs=0.03)
    assert summary["copy_closed"]["value"] == pytest.approx(0.93, abs=0.01)
    assert summary["cache_bytes_32k"]["value"] == 400_000 + 3072 * 32_768
    assert summary["perplexity"] > 1
    assert summary["recall_probes"] > 100


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 2}', '{"format": 2, "rows": 3}']
)
def test_a_file_that_is_not_results_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is not a results file .* eval"):
        Results.load(tmp_path / "results.json")


def test_the_length_from_which_decoding_is_faster() -> None:
    def curve(times: list[float]) -> list[DecodePoint]:
        return [DecodePoint(100 * 4**i, ms, (ms, ms), 0.0, 0, ms) for i, ms in enumerate(times)]

    def crossing(teacher: list[float], student: list[float]) -> int | None:
        return Results(window=4, seq_len=8, decode={"teacher": curve(teacher), "student": curve(student)}).crossing()

    assert crossing([1.0, 2.0, 8.0], [2.0, 4.0, 4.0]) == 800  # the ratio goes from 2 to 1/2: halfway
    assert crossing([1.0, 2.0, 8.0], [2.0, 1.0, 16.0]) is None
    assert crossing([3.0, 3.0, 3.0], [2.0, 2.0, 2.0]) == 100
    assert Results(window=4, seq_len=8).crossing() is None
