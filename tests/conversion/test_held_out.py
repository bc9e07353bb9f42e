"""What the models of a report read, at every length, and what is left out with a note."""

from __future__ import annotations

from pathlib import Path

import pytest

from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import held_out, stages
from trenchcoat.conversion.comparison import Comparison
from trenchcoat.conversion.variants import open_variants
from trenchcoat.evaluation.report.recommendation import recommendation
from trenchcoat.evaluation.results import Results

QUICK = ["eval.baselines=false", "eval.decode_lengths=[]", "transfer.max_steps=1", "lora.max_steps=1"]


def test_rows_at_every_length_have_as_many_tokens(tiny_overrides: list[str]) -> None:
    recipe = load_recipe("demo", [*tiny_overrides, "eval.rows=8", "eval.copy_rows=8", "eval.length_factors=[1,2]"])
    with open_variants(recipe, []) as variants:
        held = held_out.read_held_out(variants)
    assert held.text.ids.shape == (8, 48)
    assert held.longer[2].ids.shape == (4, 96)
    assert {factor: tuple(ids.shape) for factor, ids in held.copies.items()} == {1: (8, 48), 2: (4, 96)}
    assert held.notes == ()


def test_what_is_too_long_or_within_the_window_is_left_out_and_said(tiny_overrides: list[str]) -> None:
    recipe = load_recipe("demo", [*tiny_overrides, "eval.length_factors=[1,2,40,1000]", "student.window=14"])
    with open_variants(recipe, []) as variants:
        variants.model.config.max_position_embeddings = 4000
        held = held_out.read_held_out(variants)
    assert list(held.longer) == [2]
    assert list(held.copies) == [2]
    assert held.notes == (
        "Copies of 24 tokens were not scored: the window of a student holds them.",
        "Rows of 1,920 tokens were not scored: the held-out text has fewer than two.",
        "Rows of 48,000 tokens were not scored: the model has 4,000 positions.",
    )


def test_the_tables_hold_every_length_and_a_kept_row(tiny_overrides: list[str]) -> None:
    more = ["student.keep_softmax=[1]", "eval.length_factors=[1,2]", "lora.loss=ce"]
    recipe = load_recipe("demo", [*tiny_overrides, *QUICK, *more])
    outcome = stages.linearize(recipe)
    results = outcome.results
    rows = results.rows
    assert f"\n{recommendation(results)}\n" in outcome.shown
    assert {"window_sinks", "kept_window_sinks"} <= set(rows)
    assert rows["kept_window_sinks"].cache.per_token * 2 == rows["teacher"].cache.per_token
    assert rows["window_sinks"].cache.per_token == 0
    assert rows["untrained_swap"].near.sums == pytest.approx(rows["teacher"].near.sums, rel=1e-5)
    assert rows["transfer_only"].near.sums == pytest.approx(rows["teacher"].near.sums, rel=1e-5)
    assert rows["transfer_lora"].near.sums != pytest.approx(rows["teacher"].near.sums, rel=1e-5)
    assert results.model == {"groups": 4, "kept groups": 2}
    for scores in rows.values():
        assert scores.copy.counts == [24] * len(scores.copy.counts)
        assert scores.longer[2].far.count > scores.far.count
        assert scores.random_hits.count >= scores.copy.count
    kept = Results.load(Path(recipe.run.dir) / "results.json")
    assert kept.rows == rows
    text = (Path(recipe.run.dir) / "report.md").read_text()
    assert "closed past 2W, 96 tokens" in text
    assert "2 of 4 key/value groups keep softmax attention (50.0 % of the cache)" in text or "Nothing can be" in text


def test_the_teachers_control_trains_the_teacher_and_no_transfer_trains_the_maps(tiny_overrides: list[str]) -> None:
    recipe = load_recipe("demo", [*tiny_overrides, "lora.train_feature_maps=false"])
    with open_variants(recipe, []) as variants:
        comparison = Comparison(variants)
        teacher = comparison.scores("teacher")
        for stage in ("teacher_lora", "lora_only"):
            variants.train(stage)
        assert all("lora_" in name for name in variants.folder.weights("teacher_lora"))
        after = comparison.scores("teacher_lora")
        maps = {n: t for n, t in variants.folder.weights("lora_only").items() if "lora_" not in n}
        variants.assemble(lora=True)
        fresh = {n: p for n, p in variants.model.named_parameters() if n in maps}
    assert after.all.mean < teacher.all.mean
    assert maps
    assert any(not maps[name].equal(fresh[name].detach()) for name in maps)
