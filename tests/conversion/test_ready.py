"""A run that cannot finish does not begin: no step is trained before everything that can be checked is checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from transformers import PhiConfig, PhiForCausalLM

from conftest import byte_tokenizer, save_tiny_model, with_student
from tiny_families import BASE
from trenchcoat.config import Recipe, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages, variants
from trenchcoat.conversion.blocks import run as block_run
from trenchcoat.conversion.blocks.stages import run_blocks
from trenchcoat.runtime import machine
from trenchcoat.runtime.runfolder import RunFolder

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny_overrides: list[str]) -> Make:
    def recipe(*more: str) -> Recipe:
        names = [one.removeprefix("student.name=") for one in more if one.startswith("student.name=")]
        return load_recipe("demo", [*(with_student(names[0], tiny_overrides) if names else tiny_overrides), *more])

    return recipe


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def began(*arguments: Any, **keywords: Any) -> NoReturn:
        raise AssertionError("training began")

    monkeypatch.setattr(variants, "fit", began)
    monkeypatch.setattr(block_run, "fit", began)


LATE = {
    "targets": (["lora.targets=[q_proj,no_such]"], "lora.targets names 'no_such'"),
    "positions": (["data.seq_len=600"], "data.seq_len=600 is longer than the 512 positions"),
    "positions of stage 2": (["lora.seq_len=600"], "lora.seq_len=600 is longer than the 512 positions"),
    "positions of evaluation": (["eval.seq_len=600"], "eval.seq_len=600 is longer than the 512 positions"),
    "too little text for evaluation": (["eval.seq_len=500", "data.max_rows=1"], "data.seq_len=500 is longer than all"),
    "too little text for stage 2": (["lora.seq_len=500", "data.max_rows=1"], "data.seq_len=500 is longer than all"),
    "nothing to train": (
        ["transfer=null", "student.name=window_sinks", "lora.train=mixer"], "there is nothing to train",
    ),
    "logits in a file": (["lora.teacher_logits={file}/logits"], "lora.teacher_logits: {file} is a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE)
def test_a_setting_of_a_later_step_is_found_before_training(make: Make, tmp_path: Path, case: str) -> None:
    (tmp_path / "file").write_text("")
    overrides, message = LATE[case]
    with pytest.raises(UserError) as raised:
        stages.linearize(make(*(item.format(file=tmp_path / "file") for item in overrides)))
    assert message.format(file=tmp_path / "file") in str(raised.value)


@pytest.mark.parametrize("case", ["targets", "positions", "positions of evaluation", "too little text for evaluation"])
def test_and_before_blocks_are_trained(make: Make, case: str) -> None:
    overrides, message = LATE[case]
    with pytest.raises(UserError) as raised:
        run_blocks(make(*overrides))
    assert message in str(raised.value)


def test_and_before_groups_are_selected(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def selected(*arguments: Any) -> NoReturn:
        raise AssertionError("selection began")

    monkeypatch.setattr(variants, "select_groups", selected)
    with pytest.raises(UserError, match="no_such"):
        stages.linearize(make("student.keep=1", "student.window=4", "lora.targets=[no_such]"))


def test_the_disk_is_measured_before_training(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100_000

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: Usage)
    with pytest.raises(UserError, match=r"of disk are needed at .*transfer .*lora .* is free"):
        stages.linearize(make())
    with pytest.raises(UserError, match="checkpoints of the blocks"):
        run_blocks(make("transfer.keep_checkpoints=1000"))


def test_what_is_written_already_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_bytes(bytes(4096))
    machine.require_disk([(tmp_path / "run", free / 2, "a"), (tmp_path / "run" / "new", free / 4, "b")])
    monkeypatch.setattr(machine, "free_disk", lambda folder: 1000)
    machine.require_disk([(tmp_path / "run", 5000.0, "a")])
    with pytest.raises(UserError, match="a 0"):
        machine.require_disk([(tmp_path / "run", 6000.0, "a")])


def test_the_default_targets_are_those_of_phi(make: Make, tmp_path: Path) -> None:
    PhiForCausalLM(PhiConfig(**{**BASE, "vocab_size": 259})).save_pretrained(tmp_path / "phi")
    byte_tokenizer().save_pretrained(tmp_path / "phi")
    with pytest.raises(AssertionError, match="training began"):
        stages.linearize(make(f"model.path={tmp_path / 'phi'}"))


def test_nothing_is_loaded_for_a_finished_run(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    recipe = make()
    for stage in ("transfer", "lora"):
        RunFolder(recipe.run.dir).finish(stage, {}, {})
    with variants.open_variants(recipe, []) as opened:
        monkeypatch.setattr(variants, "load_base", None)
        variants.check_ready(opened, ["transfer", "lora"], scored=True)
