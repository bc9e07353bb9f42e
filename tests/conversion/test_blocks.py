"""Blockwise transfer gives the students of the joint run for any block size, storage and interruption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks_kit import LAYERS, block_overrides, learned, lines, recipe, require_same
from conftest import save_tiny_model
from trenchcoat.config import UserError
from trenchcoat.conversion import stages
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.folder import BlockFolder, cut
from trenchcoat.runtime.files import load_tensors, locked, read_json
from trenchcoat.runtime.runfolder import RunFolder
from trenchcoat.runtime.runlog import read_metrics


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("five-layers"), seed=0, num_hidden_layers=LAYERS)


@pytest.fixture
def overrides(model_dir: Path, tiny_overrides: list[str]) -> list[str]:
    return block_overrides(model_dir, tiny_overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs the joint run leaves it for the others."""
    return tmp_path_factory.mktemp("finished") / "joint"


@pytest.fixture
def joint(overrides: list[str], tmp_path: Path, finished: Path) -> dict[str, Tensor]:
    """Weights trained by the joint run, whose folder is ``tmp_path / "joint"``."""
    if not finished.exists():
        stages.transfer(recipe(overrides, tmp_path / "joint"))
        shutil.copytree(tmp_path / "joint", finished)
    else:
        shutil.copytree(finished, tmp_path / "joint")
    return learned(tmp_path / "joint")


@pytest.mark.parametrize(
    ("size", "passes", "hidden"),
    [(1, "all", "memory"), (2, "all", "disk"), (5, "all", "memory"), (2, "900", "memory"), (3, "300", "disk")],
)
def test_streaming_gives_the_students_of_the_joint_run(
    size: int, passes: str, hidden: str, overrides: list[str], joint: dict[str, Tensor], tmp_path: Path
) -> None:
    """Bit for bit: weights and all per-layer numbers in the log."""
    blocks = [f"blocks.size={size}", f"blocks.pass_tokens={passes}", f"blocks.hidden={hidden}"]
    found = blockstages.run_blocks(recipe(overrides, tmp_path / "blocks", *blocks))
    require_same(learned(tmp_path / "blocks"), joint)
    require_same(load_tensors(tmp_path / "blocks" / "adapter" / "adapter.safetensors"), joint)
    assert lines(tmp_path / "blocks") == lines(tmp_path / "joint")
    for name in ("implementation", "teacher_attention"):
        recorded = [read_json(tmp_path / run / "environment.json")[name] for run in ("blocks", "joint")]
        assert recorded[0] == recorded[1], name
    assert found.results is not None
    assert not list((tmp_path / "blocks" / "blocks" / "hidden").glob("pass-*"))


@pytest.mark.parametrize("passes", ["all", "900"])
def test_a_block_killed_between_its_last_checkpoint_and_its_record_is_finished_by_the_next_run(
    passes: str, overrides: list[str], joint: dict[str, Tensor], tmp_path: Path
) -> None:
    made = recipe(overrides, tmp_path / "blocks", "blocks.size=2", f"blocks.pass_tokens={passes}")
    blockstages.run_blocks(made)
    for block in cut(LAYERS, 2)[:2]:
        (BlockFolder(made, block).directory / "stages" / "transfer" / "result.json").unlink()
    blockstages.run_blocks(made)
    require_same(learned(tmp_path / "blocks"), joint)


def test_landmarks_kept_groups_and_padding(overrides: list[str], tmp_path: Path) -> None:
    """Initial values from text, groups that keep softmax (all of a layer, alone in a block, once), padding."""
    more = [
        "student.feature_map.init=landmarks", "student.keep=[1.1,2.0,2.1,3.0]",
        "data.packing=contiguous",
        "transfer.accumulation=2", "transfer.max_steps=3",
    ]  # fmt: skip
    stages.transfer(recipe(overrides, tmp_path / "joint", *more))
    for size in (1, 3):
        blocks = [f"blocks.size={size}", "blocks.pass_tokens=1", "blocks.hidden=memory"]
        blockstages.run_blocks(recipe(overrides, tmp_path / f"{size}", *more, *blocks))
        require_same(learned(tmp_path / f"{size}"), learned(tmp_path / "joint"))


def test_blocks_trained_separately_and_stitched(
    overrides: list[str], joint: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Collected once, trained in any order from copied tensors, stitched; LoRA continues as after the joint run."""
    made = recipe(overrides, tmp_path / "apart", "blocks.size=2")
    blockstages.collect_inputs(made)
    blockstages.shard_blocks(made, tmp_path / "parts")
    for number, folder in ((2, "layers-004-004"), (0, None)):
        weights = None if folder is None else tmp_path / "parts" / folder
        blockstages.train_block(made, number, weights)
    with pytest.raises(UserError, match=r"layer 2 is in no block \(2 layers are not\): run `blocks train`"):
        blockstages.stitch_blocks(made)
    blockstages.train_block(made, 1)
    found = blockstages.stitch_blocks(made)
    require_same(learned(tmp_path / "apart"), joint)
    table = blockstages.show_status(made)
    assert list(table.shown[0].columns[2].cells) == ["finished"] * 3
    stages.finetune(made)
    stages.finetune(recipe(overrides, tmp_path / "joint"))
    for name, tensor in RunFolder(tmp_path / "joint").weights("lora").items():
        assert torch.equal(RunFolder(tmp_path / "apart").weights("lora")[name], tensor), name
    assert found.results is not None
    whole = stages.evaluate_run(recipe(overrides, tmp_path / "joint", "eval.baselines=false"))
    assert whole.results is not None
    for row, scores in found.results.rows.items():
        assert scores.all.sums == pytest.approx(whole.results.rows[row].all.sums, rel=1e-6), row
        assert scores.far.counts == whole.results.rows[row].far.counts


def test_damaged_inputs_are_reported_and_recomputed(overrides: list[str], joint: Any, tmp_path: Path) -> None:
    made = recipe(overrides, tmp_path / "apart", "blocks.size=2")
    blockstages.collect_inputs(made)
    hidden = tmp_path / "apart" / "blocks" / "hidden" / "collected"
    (hidden / "boundary-001" / "states-00000.safetensors").unlink()
    damaged = hidden / "boundary-002" / "states-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for number in (2, 1, 0):
        blockstages.train_block(made, number)
    blockstages.stitch_blocks(made)
    require_same(learned(tmp_path / "apart"), joint)
    folder = BlockFolder(made, cut(LAYERS, 2)[2]).directory
    warnings = [line["text"] for line in read_metrics(folder) if line["kind"] == "warning"]
    assert any("boundary-002" in text and "is damaged" in text for text in warnings)


def test_each_block_has_its_epochs_and_stops_early_by_itself(overrides: list[str], tmp_path: Path) -> None:
    """Unlike in the joint run, block 0 can train half as long, and the students of the others are unchanged."""
    plain = ["transfer.schedule=constant", "blocks.size=2", "blocks.hidden=memory"]
    blockstages.run_blocks(recipe(overrides, tmp_path / "plain", *plain))
    blockstages.run_blocks(recipe(overrides, tmp_path / "epochs", *plain, "blocks.epochs=[1,2,2]"))
    steps = [
        BlockFolder(recipe(overrides, tmp_path / "epochs"), block).result() for block in cut(LAYERS, 2)
    ]  # fmt: skip
    assert [one["steps"] for one in steps if one] == [12, 23, 23]
    before, after = learned(tmp_path / "plain"), learned(tmp_path / "epochs")
    for name, tensor in before.items():
        shorter = any(f"layers.{layer}." in name for layer in (0, 1))
        assert torch.equal(tensor, after[name]) != shorter, name
    flat = ["transfer.early_stopping=1", "transfer.early_stopping_threshold=0.9", "transfer.eval_every=1"]
    blockstages.run_blocks(recipe(overrides, tmp_path / "flat", *plain, *flat))
    result = BlockFolder(recipe(overrides, tmp_path / "flat"), cut(LAYERS, 2)[0]).result()
    assert result is not None
    assert (result["early"], result["steps"]) == (True, 1)
    state = blockstages.show_status(recipe(overrides, tmp_path / "flat")).shown[0].columns[2].cells
    assert list(state) == ["stopped early"] * 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["transfer=null"], "without attention transfer there are no blocks"),
        (["data.select=esl", "data.select_rows=3"], "scores the text with the whole model"),
        (["blocks.size=2", "blocks.epochs=[1,2]"], "blocks.epochs has 2 entries, but there are 3 blocks"),
        (["student.keep_softmax=[9]"], r"names layer 9, but the layers are 0\.\.4"),
        (
            ["student.keep_softmax=[1]", "student.kept_log_scale=600", "blocks.size=1"],
            r"kept_log_scale=600: all layers of a block \(1 to 1\) are kept",
        ),
        (["blocks.pass_tokens=many"], "pass_tokens"),
        (["blocks.size=0"], "blocks.size must be at least 1"),
        (["student.name=terace"], "did you mean terrace"),
    ],
)
def test_unsupported_settings_are_refused(more: list[str], message: str, overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        blockstages.run_blocks(recipe(overrides, tmp_path / "run", *more))


def test_other_recipes_blocks_and_states_are_refused(overrides: list[str], text_file: Path, tmp_path: Path) -> None:
    made = recipe(overrides, tmp_path / "run", "blocks.size=2", "transfer.max_steps=1")
    blockstages.collect_inputs(made)
    blockstages.train_block(made, 0)
    again = [*overrides, "transfer.max_steps=1"]
    with pytest.raises(UserError, match=r"layers 0 to 1, which does not match blocks\.size=3"):
        blockstages.run_blocks(recipe(again, tmp_path / "run", "blocks.size=3"))
    with pytest.raises(UserError, match=r"--block 7: the blocks of .* are 0 to 2"):
        blockstages.train_block(made, 7)
    with pytest.raises(UserError, match=r"of another recipe: student\.window was 8, now 9"):
        blockstages.train_block(recipe(again, tmp_path / "run", "blocks.size=2", "student.window=9"), 0)
    text_file.with_name("other.jsonl").write_text(text_file.read_text().replace("coat", "boat"))
    other = recipe([*again, f"data.validation_path={text_file.with_name('other.jsonl')}"], tmp_path / "run")
    with pytest.raises(UserError, match="validation_path was None"):
        blockstages.train_block(other, 1)
    text_file.with_name("other.jsonl").unlink()


def test_changed_text_under_old_states_is_refused(overrides: list[str], text_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(text_file.read_text())
    made = recipe([*overrides, f"data.path={mine}"], tmp_path / "run", "blocks.size=2", "transfer.max_steps=1")
    blockstages.collect_inputs(made)
    mine.write_text(text_file.read_text().replace("coat", "boat"))
    with pytest.raises(UserError, match="lists hidden states of another run: text was"):
        blockstages.train_block(made, 1)


def test_two_runs_on_one_folder_are_refused_naming_the_holder(overrides: list[str], tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(UserError, match=r"is in use by process \d+ on .* since 20"):
        blockstages.run_blocks(recipe(overrides, tmp_path / "run"))
    with locked(tmp_path / "run"):
        pass
