"""Blockwise transfer under torchrun: processes share the micro-batches and give the results of one process."""

from __future__ import annotations

from pathlib import Path

import torch

from conftest import save_tiny_model
from ranks_kit import run
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder


def test_two_processes_agree_with_one(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Streamed in passes, on disk and in memory, and from jointly collected inputs.

    Three micro-batches per step do not divide by two. Gradients are summed in another order, so they agree to 1e-5
    relative, and the AdamW steps (the first ones depend only on the sign) to a hundredth of a learning rate.
    """
    save_tiny_model(tmp_path / "model", seed=0, num_hidden_layers=3)
    overrides = [
        *tiny_overrides, f"model.path={tmp_path / 'model'}", "transfer.max_steps=6", "transfer.accumulation=3",
        "transfer.batch_size=1", "transfer.schedule=constant", "data.max_rows=12", "eval.rows=3", "run.progress=off",
        "blocks.size=2", "blocks.shard_mib=1", "run.threads=1",
    ]  # fmt: skip
    recipe = load_recipe("demo", [*overrides, f"run.dir={tmp_path / 'single'}", "student.feature_map.init=identity"])
    stages.transfer(recipe)
    ways = {
        "memory": ["blocks.hidden=memory", "blocks.pass_tokens=300"],
        "disk": ["blocks.hidden=disk", "blocks.pass_tokens=all"],
        "apart": [],
    }
    jobs = [
        {
            "do": "blocks_apart" if way == "apart" else "blocks",
            "overrides": [*overrides, "student.feature_map.init=identity", *more, f"run.dir={tmp_path / way}"],
        }
        for way, more in ways.items()
    ]
    assert run(2, jobs, tmp_path / "out") == [["done"] * 3] * 2
    wanted = RunFolder(tmp_path / "single").weights(TRANSFER)
    for way in ways:
        found = RunFolder(tmp_path / way).weights(TRANSFER)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-4)
