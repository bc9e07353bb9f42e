"""Stage 2 from stored logits: one pass of the teacher, the numbers of a teacher in every step, other models refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import save_tiny_model
from trenchcoat.config import Recipe, UserError
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages, teacher_logits
from trenchcoat.runtime.runlog import read_metrics

Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tiny_overrides: list[str], tmp_path: Path) -> Make:
    """A tiny recipe without stage 1, in a folder of its own."""
    return lambda name, *more: load_recipe(
        "demo", [*tiny_overrides, f"run.dir={tmp_path / name}", "transfer=null", *more]
    )


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if line["kind"] in ("train", "eval")]


@pytest.mark.parametrize("loss", ["kl", "mix"])
def test_stored_logits_give_the_losses_of_a_teacher_in_every_step(
    loss: str, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte vocabulary is small enough to be listed whole; a second run computes nothing."""
    stages.finetune(recipe("own", f"lora.loss={loss}"))
    place = f"lora.teacher_logits={tmp_path / 'logits'}"
    stages.finetune(recipe("stored", f"lora.loss={loss}", place))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "own"), rel=2e-3, abs=1e-4)
    assert len(losses(tmp_path / "own")) > 3
    assert list((tmp_path / "logits" / "train").glob("states-*.safetensors"))
    assert not list((tmp_path / "logits").rglob(".partial*"))
    monkeypatch.setattr(teacher_logits, "packed_logits", lambda *a: pytest.fail("the teacher ran again"))
    stages.finetune(recipe("again", f"lora.loss={loss}", place))
    assert losses(tmp_path / "again") == losses(tmp_path / "stored")


def test_more_steps_add_rows_and_another_model_is_refused(recipe: Make, tmp_path: Path) -> None:
    place = f"lora.teacher_logits={tmp_path / 'logits'}"
    teacher: dict[str, Any] = {"seed": 5}
    stages.finetune(recipe("short", place, "lora.max_steps=1"))
    stages.finetune(recipe("long", place, "lora.max_steps=3"))
    save_tiny_model(tmp_path / "other", **teacher)
    with pytest.raises(UserError, match="model was"):
        stages.finetune(recipe("other", place, f"model.path={tmp_path / 'other'}"))
    with pytest.raises(UserError, match=r"data\.streaming=true does not have"):
        recipe("stream", place, "data.streaming=true", "lora.max_steps=1")
