"""Blockwise transfer in half precision, for families with renamed tensors, and on failing disks; then QLoRA."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks_kit import LAYERS, block_overrides, learned, recipe, require_same
from conftest import byte_tokenizer, save_tiny_model, small_file_system, with_student
from tiny_families import tiny_model
from trenchcoat.config import UserError
from trenchcoat.conversion import stages
from trenchcoat.conversion.blocks import stages as blockstages
from trenchcoat.conversion.blocks.data import HiddenBatches
from trenchcoat.runtime.files import SaveError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("five-layers"), seed=0, num_hidden_layers=LAYERS, hidden_size=64, head_dim=16,
        intermediate_size=128,
    )  # fmt: skip


@pytest.fixture
def overrides(model_dir: Path, tiny_overrides: list[str]) -> list[str]:
    return [*block_overrides(model_dir, tiny_overrides), "transfer.max_steps=4", "blocks.size=2"]


@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_half_precision_states_are_kept_as_they_are(hidden: str, overrides: list[str], tmp_path: Path) -> None:
    more = ["model.dtype=bfloat16"]
    stages.transfer(recipe(overrides, tmp_path / "joint", *more))
    blockstages.run_blocks(recipe(overrides, tmp_path / "blocks", *more, f"blocks.hidden={hidden}"))
    require_same(learned(tmp_path / "blocks"), learned(tmp_path / "joint"))


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "granite"])
def test_families_that_scale_embeddings_or_merge_experts(family: str, overrides: list[str], tmp_path: Path) -> None:
    tiny_model(family, num_hidden_layers=3, vocab_size=259).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    more = [f"model.path={tmp_path / 'model'}"]
    stages.transfer(recipe(overrides, tmp_path / "joint", *more))
    blockstages.run_blocks(recipe(overrides, tmp_path / "blocks", *more))
    require_same(learned(tmp_path / "blocks"), learned(tmp_path / "joint"))


def test_a_student_that_reads_the_layers_input_and_starts_from_text(overrides: list[str], tmp_path: Path) -> None:
    own = [*with_student("gdn", overrides), "student.sinks=2"]
    stages.transfer(recipe(own, tmp_path / "joint"))
    blockstages.run_blocks(recipe(own, tmp_path / "blocks"))
    require_same(learned(tmp_path / "blocks"), learned(tmp_path / "joint"))


@pytest.mark.filterwarnings("ignore:.*_check_is_size.*", "ignore::FutureWarning")
def test_lora_continues_on_a_four_bit_base(overrides: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    more = ["model.dtype=bfloat16", "transfer.max_steps=1"]
    with pytest.raises(UserError, match="blocks are read as stored"):
        blockstages.run_blocks(recipe(overrides, tmp_path / "run", *more, "model.quantize=nf4"))
    blockstages.run_blocks(recipe(overrides, tmp_path / "run", *more))
    stages.finetune(recipe(overrides, tmp_path / "run", *more, "model.quantize=nf4"))
    with pytest.raises(UserError, match=r"model\.quantize was 'nf4', now 'none'"):
        stages.finetune(recipe(overrides, tmp_path / "run", *more))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 384 KiB that reports more free space than it has."""
    with small_file_system(tmp_path / "disk", "384k") as folder:
        yield folder


def test_a_disk_that_is_too_small_is_reported_first_and_a_full_one_keeps_what_is_finished(
    overrides: list[str], small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.transfer(recipe(overrides, tmp_path / "joint"))
    disk = ["blocks.hidden=disk", f"blocks.hidden_dir={small_disk}"]
    with pytest.raises(UserError, match="hidden states of a pass do not fit"):
        blockstages.run_blocks(recipe(overrides, tmp_path / "run", *disk))
    with pytest.raises(UserError, match="the inputs of all blocks need"):
        blockstages.collect_inputs(recipe(overrides, tmp_path / "run", *disk))
    monkeypatch.setattr(blockstages, "free_disk", lambda place: 1 << 40)
    with pytest.raises(SaveError, match=r"the disk is full while saving .*states-00000"):
        blockstages.run_blocks(recipe(overrides, tmp_path / "run", *disk))
    monkeypatch.undo()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    blockstages.run_blocks(recipe(overrides, tmp_path / "run", *disk, "blocks.shard_mib=1"))
    require_same(learned(tmp_path / "run"), learned(tmp_path / "joint"))


def test_a_disk_that_vanishes_is_reported_and_the_next_run_continues(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of hidden states disappears while the second block is trained."""
    stages.transfer(recipe(overrides, tmp_path / "joint"))
    made = recipe(overrides, tmp_path / "run", "blocks.hidden=disk", f"blocks.hidden_dir={tmp_path / 'hidden'}")
    make, calls = HiddenBatches._make, 0

    def vanishing(self: HiddenBatches, wanted: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            shutil.rmtree(tmp_path / "hidden")
        return make(self, wanted)

    monkeypatch.setattr(HiddenBatches, "_make", vanishing)
    with pytest.raises(UserError, match=r"cannot (be read|save)|No such file"):
        blockstages.run_blocks(made)
    monkeypatch.undo()
    blockstages.run_blocks(made)
    require_same(learned(tmp_path / "run"), learned(tmp_path / "joint"))


def test_an_unwritable_folder_is_reported(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = recipe(overrides, tmp_path / "run", "blocks.hidden=disk", f"blocks.hidden_dir={tmp_path / 'file'}/below")
    with pytest.raises(UserError, match=r"cannot save .*file/below"):
        blockstages.run_blocks(made)
    with pytest.raises(UserError, match=r"run.dir: .*file is a file, so .*file/run cannot be written"):
        blockstages.run_blocks(recipe(overrides, tmp_path / "file" / "run"))


def test_missing_weights_are_reported(overrides: list[str], model_dir: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model_dir, tmp_path / "model")
    next(iter(copied.glob("*.safetensors"))).unlink()
    with pytest.raises(UserError, match="has no safetensors files"):
        blockstages.run_blocks(recipe(overrides, tmp_path / "run", f"model.path={copied}"))
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no safetensors files"):
        blockstages.run_blocks(recipe(overrides, tmp_path / "run", f"model.path={copied}"))
