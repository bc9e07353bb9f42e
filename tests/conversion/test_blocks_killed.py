"""A blockwise transfer killed at random moments ends like an uninterrupted one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_tiny_model
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder

KILLER = Path(__file__).parents[1] / "blocks_killer.py"


@pytest.mark.parametrize(("hidden", "tokens", "kills"), [("disk", "all", 20), ("memory", "700", 6)])
def test_killed_at_random_moments(
    hidden: str, tokens: str, kills: int, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """The students are bit-identical to those of the uninterrupted joint run."""
    save_tiny_model(tmp_path / "model", seed=0, num_hidden_layers=4)
    overrides: list[Any] = [
        *tiny_overrides, f"model.path={tmp_path / 'model'}", "transfer.max_steps=24", "transfer.eval_every=4",
        "transfer.save_every=3", "transfer.schedule=plateau", "transfer.plateau_patience=0", "run.progress=off",
        "eval.rows=2",
    ]  # fmt: skip
    stages.transfer(load_recipe("lolcats_llama3_1_8b", [*overrides, f"run.dir={tmp_path / 'joint'}"]))
    blocks = [f"run.dir={tmp_path / 'blocks'}", "blocks.size=1", f"blocks.pass_tokens={tokens}"]
    command = [sys.executable, str(KILLER), "7", "0.05", str(kills), *overrides, *blocks, f"blocks.hidden={hidden}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) == kills
    wanted, found = (RunFolder(tmp_path / name).weights(TRANSFER) for name in ("joint", "blocks"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
