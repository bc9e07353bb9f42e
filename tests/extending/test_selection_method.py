"""A new method of selection: one function and one line in METHODS."""

from __future__ import annotations

from pathlib import Path

import pytest

from trenchcoat.config import UserError
from trenchcoat.config.recipe_io import load_recipe, settings_help
from trenchcoat.conversion import stages
from trenchcoat.conversion.selection.probe import Probe
from trenchcoat.conversion.selection.registry import METHODS
from trenchcoat.evaluation.selection import LayerScores, Selection
from trenchcoat.models.families import attention_sites


def late_layers(probe: Probe) -> dict[str, LayerScores]:
    """The later the layer, the better."""
    return {"depth": [[float(site.index)] * site.num_kv_heads for site in attention_sites(probe.model)]}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the line; removed after the test."""
    monkeypatch.setitem(METHODS, "late_layers", f"{__name__}:late_layers")


def test_help_and_checks_know_it() -> None:
    assert "gates | retrieval | uniform | random | late_layers" in settings_help(["select"])
    with pytest.raises(UserError, match=r"select\.method must be one of .*did you mean late_layers"):
        load_recipe("demo", ["select.method=late_layer"])


def test_it_selects(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    overrides = [
        f"model.path={tiny_model_dir}", f"data.path={text_file}", "data.format=text", "data.seq_len=32",
        "student.window=8", "student.keep=2", "select.method=late_layers", "select.frontier=[0.5]",
        "select.frontier_rows=2", f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}",
        "data.validation_rows=4", "run.progress=off",
    ]  # fmt: skip
    found = stages.select(load_recipe("demo", overrides)).results
    assert isinstance(found, Selection)
    assert found.kept == ("1.0", "1.1")
    assert {(point.method, point.groups) for point in found.frontier} >= {("late_layers", 2), ("uniform", 2)}
