"""Transfer block by block gives the students of the joint run, however it is cut, kept, and interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import save_tiny_model
from trenchcoat import blockstages, stages
from trenchcoat.config import Recipe
from trenchcoat.files import load_tensors
from trenchcoat.recipe_io import load_recipe
from trenchcoat.runfolder import TRANSFER, RunFolder
from trenchcoat.runlog import read_metrics

LAYERS = 5


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("five-layers"), seed=0, num_hidden_layers=LAYERS)


@pytest.fixture
def overrides(model_dir: Path, tiny_overrides: list[str]) -> list[str]:
    """Two epochs over a few rows, a schedule and clipping that listen to each layer, weights drawn at random."""
    return [
        *tiny_overrides, f"model.path={model_dir}", "data.max_rows=14", "transfer.max_steps=null", "transfer.epochs=2",
        "transfer.accumulation=3", "transfer.eval_every=3", "transfer.save_every=2", "transfer.schedule=plateau",
        "transfer.plateau_patience=0", "transfer.lr=0.05", "student.feature_map.init=kaiming",
        "blocks.shard_mib=1", "run.progress=off",
    ]  # fmt: skip


def recipe(overrides: list[str], folder: Path, *more: str) -> Recipe:
    return load_recipe("llama3_1_8b", [*overrides, f"run.dir={folder}", *more])


def learned(folder: Path) -> dict[str, Tensor]:
    return RunFolder(folder).weights(TRANSFER)


def require_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def joint(overrides: list[str], tmp_path: Path) -> dict[str, Tensor]:
    stages.transfer(recipe(overrides, tmp_path / "joint"))
    return learned(tmp_path / "joint")


def lines(folder: Path) -> list[dict[str, Any]]:
    """What the log says of the training, without clocks and what sums in another order."""
    leave = ("time", "seconds", "loss", "grad_norm", "mse", "relative", "lr")
    return [
        {k: v for k, v in line.items() if k not in leave and not k.startswith("speed/")}
        for line in read_metrics(folder)
        if line["kind"] in ("train", "eval")
    ]


@pytest.mark.parametrize(
    ("size", "passes", "hidden"),
    [(1, "all", "memory"), (2, "all", "disk"), (5, "all", "memory"), (2, "900", "memory"), (3, "300", "disk")],
)
def test_streaming_gives_the_students_of_the_joint_run(
    size: int, passes: str, hidden: str, overrides: list[str], joint: dict[str, Tensor], tmp_path: Path
) -> None:
    """Bit for bit: weights, and every per-layer number of the log."""
    blocks = [f"blocks.size={size}", f"blocks.pass_tokens={passes}", f"blocks.hidden={hidden}"]
    found = blockstages.run(recipe(overrides, tmp_path / "blocks", *blocks))
    require_same(learned(tmp_path / "blocks"), joint)
    require_same(load_tensors(tmp_path / "blocks" / "adapter" / "adapter.safetensors"), joint)
    assert lines(tmp_path / "blocks") == lines(tmp_path / "joint")
    assert found.results is not None
    assert not list((tmp_path / "blocks" / "blocks" / "hidden").glob("pass-*"))
