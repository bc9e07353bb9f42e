"""A new learning-rate schedule: one class and one line in SCHEDULES."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_kit import RandomBatches, fit_transfer, transfer_model, transfer_settings
from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe, settings_help
from trenchcoat.runtime.runlog import read_metrics
from trenchcoat.training.schedules import SCHEDULES, Schedule


class InverseRoot(Schedule):
    """Decays with the inverse square root of the completed fraction of steps."""

    def rate_at(self, share: float) -> float:
        """lr / sqrt(1 + 4 share), never below ``min_lr``."""
        return max(self.min_lr, self.cfg.lr / (1.0 + 4.0 * share) ** 0.5)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the line; removed after the test."""
    monkeypatch.setitem(SCHEDULES, "inverse_root", InverseRoot)


def test_help_and_checks_know_it() -> None:
    assert "plateau | cosine | linear | constant | inverse_root" in settings_help(["transfer"])
    recipe = load_recipe("demo", ["transfer.schedule=inverse_root"])
    assert recipe.transfer is not None
    assert recipe.transfer.schedule == "inverse_root"
    with pytest.raises(UserError, match=r"lora\.schedule must be one of .*inverse_root.*did you mean inverse_root"):
        load_recipe("demo", ["lora.schedule=inverse_rot"])


def test_training_follows_it_and_a_checkpoint_holds_its_state(tmp_path: Path) -> None:
    cfg = transfer_settings(schedule="inverse_root", lr=1e-2, warmup_steps=0)
    first = fit_transfer(transfer_model(), tmp_path, cfg, RandomBatches(), until=4)
    assert not first.finished
    second = fit_transfer(transfer_model(), tmp_path, cfg, RandomBatches())
    assert second.resumed_from == 4
    rates = [line["lr"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert rates == pytest.approx([1e-2 / (1 + 4 * step / 12) ** 0.5 for step in range(12)])
