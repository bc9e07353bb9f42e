"""A small blockwise transfer and comparisons of two of them, shared by the tests of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trenchcoat.config import Recipe
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.runtime.runfolder import TRANSFER, RunFolder
from trenchcoat.runtime.runlog import read_metrics

LAYERS = 5


def block_overrides(model_dir: Path, tiny_overrides: list[str]) -> list[str]:
    """Two epochs over a few rows, per-layer schedule and clipping, random weights.

    The learning rate is so high that losses fluctuate: layers then differ in their schedules and best weights.
    """
    return [
        *tiny_overrides, f"model.path={model_dir}", "data.max_rows=14", "transfer.max_steps=null", "transfer.epochs=2",
        "transfer.accumulation=3", "transfer.eval_every=3", "transfer.save_every=2", "transfer.schedule=plateau",
        "transfer.plateau_patience=0", "transfer.lr=0.5", "student.feature_map.init=kaiming",
        "blocks.shard_mib=1", "run.progress=off",
    ]  # fmt: skip


def recipe(overrides: list[str], folder: Path, *more: str) -> Recipe:
    """The recipe of a run in ``folder``."""
    return load_recipe("lolcats_llama3_1_8b", [*overrides, f"run.dir={folder}", *more])


def learned(folder: Path) -> dict[str, Tensor]:
    """The weights trained by the transfer in a run's folder."""
    return RunFolder(folder).weights(TRANSFER)


def require_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert that the tensors are bit-identical."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log's training numbers, without times and those summed in another order."""
    leave = ("time", "seconds", "loss", "grad_norm", "mse", "relative", "lr")
    return [
        {k: v for k, v in line.items() if k not in leave and not k.startswith("speed/")}
        for line in read_metrics(folder)
        if line["kind"] in ("train", "eval")
    ]
