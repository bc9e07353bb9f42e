"""A new objective for stage 2: one function and one line in OBJECTIVES."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from trenchcoat.config import LoraConfig, Recipe, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.data.batches import Batch
from trenchcoat.runtime.runlog import read_metrics
from trenchcoat.training.logits import Teacher
from trenchcoat.training.losses import OBJECTIVES
from trenchcoat.training.objectives import IDLE, Metrics, Objective, next_token_loss


def smoothed(cfg: LoraConfig, teacher: Teacher) -> Objective:
    """Next-token loss plus a tenth of the logits' squared mean, which is also logged separately."""

    def objective(model: nn.Module, batch: Batch) -> Metrics:
        learning = torch.is_grad_enabled()
        model.train(learning)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss, count = next_token_loss(logits, batch["labels"])
        size = logits.float().square().mean()
        if learning:
            ((loss + 0.1 * size) * (IDLE not in batch)).backward()
        return {"loss": (loss + 0.1 * size).item(), "size": size.item(), "tokens": float(count)}

    return objective


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the line; removed after the test."""
    monkeypatch.setitem(OBJECTIVES, "smoothed", smoothed)


@pytest.fixture
def recipe(tiny_overrides: list[str], tmp_path: Path) -> Callable[..., Recipe]:
    """A tiny recipe without stage 1."""
    return lambda *more: load_recipe("demo", [*tiny_overrides, f"run.dir={tmp_path}", "transfer=null", *more])


def test_stage_2_minimizes_it_and_the_record_names_it(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    stages.finetune(recipe("lora.loss=smoothed"))
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert lines
    assert all(line["size"] > 0 for line in lines)
    assert "loss: smoothed" in (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"lora\.loss was 'smoothed', now 'ce'"):
        stages.finetune(recipe("lora.loss=ce"))


def test_an_unknown_name_is_refused_before_anything_is_loaded(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.loss must be one of kl, ce, mix, smoothed, got 'none_such'"):
        stages.finetune(recipe("lora.loss=none_such"))
    assert not (tmp_path / "metrics.jsonl").exists()
