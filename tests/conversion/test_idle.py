"""A run whose steps have fewer micro-batches than there are processes says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from trenchcoat.config import LoraConfig, TransferConfig
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import run, stages, variants
from trenchcoat.conversion.blocks import stages as block_stages
from trenchcoat.runtime.runlog import read_metrics


@pytest.mark.parametrize(("processes", "idle"), [(1, None), (4, None), (6, 2)])
def test_processes_without_work_are_counted(processes: int, idle: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.distributed, "size", lambda: processes)
    for name, cfg in (("transfer", TransferConfig(accumulation=4)), ("lora", LoraConfig(accumulation=4))):
        found = run.idle_warning(cfg)
        if idle is None:
            assert found is None
            continue
        assert found is not None
        assert f"so {idle} of them do nothing; {name}.accumulation={processes} keeps all busy" in found


@pytest.mark.parametrize("blocks", [False, True])
def test_the_run_warns(
    blocks: bool, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("demo", [*tiny_overrides, "transfer.max_steps=1", f"run.dir={tmp_path / 'run'}"])
    monkeypatch.setattr(block_stages if blocks else variants, "idle_warning", lambda cfg: "some do nothing")
    (block_stages.run_blocks if blocks else stages.transfer)(recipe)
    told = [line["text"] for line in read_metrics(tmp_path / "run") if line["kind"] == "warning"]
    assert "some do nothing" in told
