"""Numbers, their standard errors, and the results file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from report_kit import made_results
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.statistics import Estimate, RowSums, gap_closed, paired_difference


def row_sums(means: list[float], count: int = 50) -> RowSums:
    return RowSums([mean * count for mean in means], [count] * len(means))


def test_mean_is_over_tokens_not_rows() -> None:
    assert RowSums([10.0, 1.0], [90, 10]).mean == pytest.approx(0.11)
    assert math.isnan(RowSums([0.0], [0]).mean)


def test_bootstrap_error_agrees_with_the_standard_error_of_a_mean() -> None:
    noise = random.Random(0)
    means = [noise.gauss(3, 0.5) for _ in range(200)]
    centre = sum(means) / len(means)
    expected = math.sqrt(sum((x - centre) ** 2 for x in means) / (len(means) - 1) / len(means))
    assert row_sums(means).error == pytest.approx(expected, rel=0.06)


def test_the_noise_is_the_same_in_every_process() -> None:
    assert row_sums([1.0, 2.0, 4.0]).error == pytest.approx(0.7114712, abs=1e-6)


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


def test_the_better_window_row_is_the_reference() -> None:
    results = made_results()
    assert results.best_window_row() == "window_sinks_lora"
    assert made_results(window_sinks=(0.1, 0.1)).best_window_row() == "window_sinks"
    share = results.far_share_closed("window_sinks_lora")
    assert share is not None
    assert share.value == pytest.approx(0)


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
    assert summary["share_closed"]["value"] == pytest.approx(0.98, abs=0.02)
    assert summary["perplexity"] > 1
    assert summary["recall_probes"] > 100


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "rows": 3}']
)
def test_a_file_that_is_not_results_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is not a results file .* eval"):
        Results.load(tmp_path / "results.json")
