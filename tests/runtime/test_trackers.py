"""Metrics trackers: TensorBoard's own reader finds them, wandb is called as documented, nothing runs by default."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trenchcoat.config import UserError
from trenchcoat.runtime import trackers
from trenchcoat.runtime.runlog import RunLog


def _two_lines(log: RunLog) -> None:
    log.log("train", stage="transfer", step=1, loss=2.5, tokens=64)
    log.log("eval", stage="transfer", step=1, loss=2.25)
    log.info("words are not numbers")


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `track` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, progress="off", trackers=trackers.open_trackers(("tensorboard",), tmp_path, "coats")) as log:
        _two_lines(log)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert read["transfer/train/loss"] == [(1, 2.5)]
    assert read["transfer/eval/loss"] == [(1, 2.25)]
    assert read["transfer/train/tokens"] == [(1, 64.0)]


def test_wandb_is_called_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake wandb, which is not a pinned dependency: it records its calls."""
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda numbers: calls.append(("log", numbers)), finish=lambda: calls.append(("finish", None))
    )
    stand_in: Any = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    stand_in.init = lambda **settings: calls.append(("init", settings)) or run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    opened = trackers.open_trackers(("wandb",), tmp_path / "mine", "coats")
    with RunLog(tmp_path / "mine", progress="off", trackers=opened) as log:
        _two_lines(log)
    assert calls[0][1]["project"] == "coats"
    assert calls[0][1]["name"] == "mine"
    assert calls[1:] == [
        (
            "log",
            {"transfer/train/step": 1.0, "transfer/train/loss": 2.5, "transfer/train/tokens": 64.0, "transfer/step": 1},
        ),
        ("log", {"transfer/eval/step": 1.0, "transfer/eval/loss": 2.25, "transfer/step": 1}),
        ("finish", None),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"run.trackers names {name}, but {name} is not installed: pip install"):
        trackers.open_trackers((name,), tmp_path, "coats")


def test_nothing_is_opened_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in trackers.TRACKERS:
        monkeypatch.setitem(trackers.TRACKERS, name, lambda *_: pytest.fail("a tracker was opened"))
    with RunLog(tmp_path, progress="off") as log:
        _two_lines(log)
    assert not (tmp_path / "tensorboard").exists()
