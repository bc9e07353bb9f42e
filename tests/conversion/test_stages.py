"""The commands end to end on a tiny random model: every stage, every row, resuming, refusing another recipe."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_tiny_model
from trenchcoat.config import Recipe, RunConfig, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages, variants
from trenchcoat.conversion.comparison import stages_of
from trenchcoat.conversion.held_out import evaluation_rows
from trenchcoat.data import stream, stream_sources
from trenchcoat.data.stream import StreamedBatches
from trenchcoat.evaluation.report.recommendation import recommendation
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.rows import (
    FAR_OFF,
    KEPT_WINDOW,
    REPORT_ROWS,
    ConstantRow,
    LoraOnlyRow,
    TransferLoraRow,
    TransferOnlyRow,
    asked_rows,
    final_row,
    row_label,
)
from trenchcoat.evaluation.scoring import score
from trenchcoat.generation.generate import Sampling, generate_rows
from trenchcoat.models import loading
from trenchcoat.models.hub import load
from trenchcoat.ops.compiled.build import compiler
from trenchcoat.runtime import machine
from trenchcoat.runtime.files import load_tensors, save_tensors
from trenchcoat.runtime.runfolder import RunFolder, flatten, stage_settings
from trenchcoat.runtime.runlog import read_metrics
from trenchcoat.runtime.sealed import write_sealed

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_overrides: list[str]) -> Make:
    def recipe(*more: str) -> Recipe:
        return load_recipe("demo", [*tiny_overrides, *more])

    return recipe


def _losses(found: Results) -> dict[str, float]:
    return {name: scores.all.mean for name, scores in found.rows.items()}


def _no_training(*arguments: Any, **keywords: Any) -> None:
    raise AssertionError("a finished stage was trained again")


def test_linearize_makes_every_row_and_the_whole_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make()
    outcome = stages.linearize(recipe)
    assert outcome.results is not None
    assert set(outcome.results.rows) == {*REPORT_ROWS} - {KEPT_WINDOW, ConstantRow.name}
    folder = Path(recipe.run.dir)
    names = ("recipe.yaml", "environment.json", "metrics.jsonl", "results.json", "report.md", "rows.png")
    for name in (*names, "adapter/trenchcoat.json", "adapter/adapter.safetensors", "checkpoints/transfer"):
        assert (folder / name).exists(), name
    assert not (folder / "adapter" / "config.json").exists()
    assert load_recipe(folder) == recipe
    chosen = "chunkwise" if compiler() is None else "compiled"
    assert json.loads((folder / "environment.json").read_text())["implementation"] == chosen
    assert outcome.results.implementation == chosen
    assert {line.get("stage") for line in read_metrics(folder)} >= set(stages_of(recipe))

    stages.export(folder, folder / "given", merge=True)
    card = (folder / "given" / "README.md").read_text()
    assert recommendation(outcome.results) in card
    assert f"| **{row_label(TransferLoraRow.name)}** |" in card
    assert "- lora: 4 steps" in card
    assert str(folder) not in card
    stages.export(folder / "given", folder / "given again", merge=True)
    assert (folder / "given again" / "README.md").read_text() == card

    model, _ = load(folder)
    with variants.open_variants(recipe, []) as one:
        mine = evaluation_rows(one.batches(2), recipe.eval.rows)
    again = score(model, mine, window=recipe.student.window)
    assert again.all.mean == pytest.approx(outcome.results.rows[TransferLoraRow.name].all.mean, abs=1e-6)

    monkeypatch.setattr(variants, "fit", _no_training)
    monkeypatch.setattr(loading, "load_model", _no_training)
    second = stages.linearize(recipe).results
    assert second is not None
    assert _losses(second) == _losses(outcome.results)


def test_a_transfer_over_other_weights_is_not_continued(make: Make, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    recipe = make(f"model.path={model}", "eval.baselines=false")
    stages.transfer(recipe)
    save_tiny_model(model, seed=1)
    with pytest.raises(UserError, match="was made with other base weights"):
        stages.finetune(recipe)
    save_tiny_model(model, seed=0)
    stages.finetune(recipe)


def test_scores_belong_to_the_base_weights(make: Make, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    recipe = make(f"model.path={model}", "eval.baselines=false", "lora=null")
    before = stages.linearize(recipe).results
    weights = load_tensors(model / "model.safetensors")
    weights["model.norm.weight"] *= 1.5  # the base's fingerprint does not look at it
    save_tensors(model / "model.safetensors", weights, {"format": "pt"})
    after = stages.evaluate_run(recipe).results
    assert before is not None
    assert after is not None
    assert all(loss != _losses(before)[name] for name, loss in _losses(after).items())
    save_tiny_model(model, seed=1)
    with pytest.raises(UserError, match=r"stage 'transfer' .* was made with other base weights"):
        stages.evaluate_run(recipe)


def test_the_two_stages_alone_give_what_linearize_gives(make: Make, tmp_path: Path) -> None:
    whole, apart = make(), make(f"run.dir={tmp_path / 'apart'}", "eval.baselines=false")
    one = stages.linearize(whole).results
    stages.transfer(apart)
    assert load(apart.run.dir)
    stages.finetune(apart)
    two = stages.evaluate_run(apart).results
    assert one is not None
    assert two is not None
    assert _losses(two) == {name: loss for name, loss in _losses(one).items() if name in two.rows}
    assert LoraOnlyRow.name not in two.rows


def test_a_run_that_was_stopped_ends_with_the_same_numbers(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stages.linearize(make()).results
    other = make(f"run.dir={tmp_path / 'stopped'}")
    fit = variants.fit

    def stopped_in(stage: str) -> None:
        def interrupted(*arguments: Any, **keywords: Any) -> Any:
            done = fit(*arguments, **keywords)
            return dataclasses.replace(done, stopped=True) if keywords["stage"] == stage else done

        monkeypatch.setattr(variants, "fit", interrupted)

    for stage in stages_of(other):
        stopped_in(stage)
        with pytest.raises(KeyboardInterrupt):
            stages.linearize(other)
    monkeypatch.setattr(variants, "fit", fit)
    resumed = stages.linearize(other).results
    assert whole is not None
    assert resumed is not None
    assert _losses(resumed) == _losses(whole)


def test_selection_ranks_with_the_bare_model_once_and_trains_on_the_best(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(name: str, *more: str) -> Recipe:
        return make(
            "data.select=esl", "data.select_rows=12", "student.feature_map.init=landmarks", "eval.seq_len=40",
            "eval.decode_lengths=[]", "eval.baselines=false", f"run.dir={tmp_path / name}", *more,
        )  # fmt: skip

    first = stages.linearize(recipe("one")).results
    [line] = [line["text"] for line in read_metrics(tmp_path / "one") if "ranking" in line.get("text", "")]
    assert "effective sequence length" in line
    assert any("of 12 selected" in line.get("text", "") for line in read_metrics(tmp_path / "one"))
    monkeypatch.setattr(variants.EslRanking, "_score", _no_training)  # cached: not ranked again
    assert first is not None
    second = stages.linearize(recipe("two")).results
    assert second is not None
    assert _losses(second) == _losses(first)
    monkeypatch.undo()
    stages.transfer(recipe("three", f"data.cache_dir={tmp_path / 'fresh'}"))  # ranked with nothing attached
    stages.finetune(recipe("three", f"data.cache_dir={tmp_path / 'again'}"))  # ranked after stage 1
    third = stages.evaluate_run(recipe("three")).results
    assert third is not None
    assert _losses(third) == _losses(first)
    scored = stages.evaluate_folder(tmp_path / "one" / "adapter", recipe("one"))
    assert scored.results is not None
    text = (tmp_path / "one" / "report.md").read_text()
    assert "train/rows_selected | 12" in text


def test_a_stream_stopped_in_either_stage_ends_with_the_same_numbers(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_sources, "SHARD_BYTES", 1000)
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 8)
    monkeypatch.setattr(stream, "BLOCK_ROWS", 0)

    def recipe(name: str) -> Recipe:
        return make(
            "data.streaming=true", f"run.dir={tmp_path / name}", "eval.decode_lengths=[]", "eval.baselines=false",
            f"data.cache_dir={tmp_path / name / 'cache'}", "transfer.max_steps=6", "lora.max_steps=6",
        )  # fmt: skip

    whole = stages.linearize(recipe("whole")).results
    assert any("as a stream in" in line.get("text", "") for line in read_metrics(tmp_path / "whole"))
    make_batch = StreamedBatches.train_batch
    asked = 0

    def stop_at(limit: int) -> None:
        def train_batch(self: StreamedBatches, index: int) -> Any:
            nonlocal asked
            asked += 1
            if asked == limit:
                os.kill(os.getpid(), signal.SIGINT)
            return make_batch(self, index)

        monkeypatch.setattr(StreamedBatches, "train_batch", train_batch)

    for limit in (7, 16):
        stop_at(limit)
        with pytest.raises(KeyboardInterrupt):
            stages.linearize(recipe("stopped"))
    monkeypatch.setattr(StreamedBatches, "train_batch", make_batch)
    resumed = stages.linearize(recipe("stopped")).results
    assert whole is not None
    assert resumed is not None
    assert _losses(resumed) == _losses(whole)


def test_without_transfer_stage_2_is_the_baseline(make: Make) -> None:
    recipe = make("transfer=null", "eval.decode_lengths=[]")
    assert stages_of(recipe) == ["lora_only", "teacher_lora", "window_sinks_lora"]
    found = stages.linearize(recipe).results
    assert found is not None
    assert found.converted() == LoraOnlyRow.name
    assert TransferOnlyRow.name not in found.rows
    assert found.decode == {}


def test_without_lora_only_the_transfer_is_scored(make: Make) -> None:
    recipe = make("lora=null")
    assert stages_of(recipe) == ["transfer"]
    found = stages.linearize(recipe).results
    assert found is not None
    assert found.converted() == TransferOnlyRow.name
    with pytest.raises(UserError, match="lora=null"):
        stages.finetune(recipe)


def test_a_linear_student_has_no_row_without_its_far_part(make: Make) -> None:
    assert FAR_OFF not in asked_rows(load_recipe("demo", ["student.name=linear"]))
    assert FAR_OFF in asked_rows(make())
    assert final_row(make()) == TransferLoraRow.name


def test_both_stages_null_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="nothing to do"):
        stages.linearize(make("transfer=null", "lora=null"))


def test_finetune_requires_a_finished_transfer(make: Make) -> None:
    with pytest.raises(UserError, match="has not been run"):
        stages.finetune(make())
    with pytest.raises(UserError, match=r"is not finished \(transfer is missing\)"):
        stages.evaluate_run(make())


def test_another_recipe_in_the_same_folder_is_refused_naming_the_setting(make: Make) -> None:
    stages.transfer(make())
    with pytest.raises(UserError, match=r"transfer\.lr was 0\.01, now 0\.02.*run\.dir"):
        stages.transfer(make("transfer.lr=0.02"))
    with pytest.raises(UserError, match=r"student\.window was 8, now 16"):
        stages.finetune(make("student.window=16"))
    stages.transfer(make("lora.lr=0.01", "transfer.save_every=1", "run.progress=off"))  # stage 1 did not change


def test_a_checkpoint_of_another_base_model_is_refused(make: Make, other_model_dir: Path, tiny_model_dir: Path) -> None:
    recipe = make()
    stages.transfer(recipe)
    settings = RunFolder(recipe.run.dir).stage_dir("transfer") / "settings.json"
    held = json.loads(settings.read_text())
    (RunFolder(recipe.run.dir).stage_dir("transfer") / "result.json").unlink()
    write_sealed(settings, {**held, "model.path": str(other_model_dir)})
    with pytest.raises(UserError, match="base weights was"):
        stages.transfer(make(f"model.path={other_model_dir}"))


def test_an_unknown_student_is_refused_before_anything_is_written(make: Make) -> None:
    recipe = make()
    recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, name="terace"))
    with pytest.raises(UserError, match="terrace"):
        stages.transfer(recipe)
    assert not Path(recipe.run.dir).exists()


def test_settings_of_a_stage() -> None:
    recipe = Recipe()
    assert "transfer.lr" in stage_settings(recipe, "lora")
    assert "lora.lr" not in stage_settings(recipe, "transfer")
    assert "student.feature_map.name" not in stage_settings(recipe, "window_sinks_lora")
    assert "model.device" not in stage_settings(recipe, "transfer")
    assert flatten(recipe)["student.keep_softmax"] == []


def test_generate_and_export(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make("lora.max_steps=2", "transfer.max_steps=2")
    stages.transfer(recipe)
    stages.finetune(recipe)
    folder = Path(recipe.run.dir)
    (row,) = generate_rows(*load(folder), ["The coat"], Sampling(max_new_tokens=4), compare=True)
    assert row["prompt"] == "The coat"
    assert {"text", "softmax"} <= set(row)
    stages.export(folder, tmp_path / "adapter", merge=False)
    stages.export(folder, tmp_path / "merged", merge=True)
    ids = torch.arange(3, 40)[None]
    logits = [load(place)[0](input_ids=ids).logits for place in (folder, tmp_path / "adapter", tmp_path / "merged")]
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=1e-5)
    capsys.readouterr()
    scored = stages.evaluate_folder(tmp_path / "merged", recipe).results
    assert scored is not None
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == f"loading {tmp_path / 'merged'}"
    assert re.match(r"scoring merged 4/4 \([\d.]+ rows/s\)", shown[-1])
    stages.evaluate_folder(tmp_path / "merged", dataclasses.replace(recipe, run=RunConfig(progress="off")))
    assert capsys.readouterr().err == ""
    assert list(scored.rows) == ["merged"]
    with pytest.raises(UserError, match="not empty"):
        stages.export(folder, tmp_path / "merged", merge=True)


def test_the_demo_checks_the_machine_first(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda directory: 1000)
    with pytest.raises(UserError, match=r"this machine is not ready: .* of disk are free"):
        stages.demo(make())


def test_the_row_without_kept_groups_is_the_conversion_without_them(tiny_overrides: list[str], tmp_path: Path) -> None:
    one = [*tiny_overrides, "eval.baselines=false", "eval.decode_lengths=[]", "student.feature_map.init=landmarks"]
    kept = stages.linearize(load_recipe("demo", [*one, "student.keep=[1.0]", "eval.constant=true"])).results
    none = stages.linearize(load_recipe("demo", [*one, f"run.dir={tmp_path / 'none'}", "eval.constant=true"])).results
    assert isinstance(kept, Results)
    assert isinstance(none, Results)
    assert "constant" not in none.rows
    found, wanted = kept.rows["constant"], none.rows["transfer_lora"]
    assert found.all.sums == wanted.all.sums != kept.rows["transfer_lora"].all.sums
    assert found.cache is not None
    assert found.cache.per_token == 0
    assert [stage.name for stage in kept.stages] == ["transfer", "lora", "constant_transfer", "constant_lora"]
