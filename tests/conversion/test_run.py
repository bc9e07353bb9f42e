"""What the log of a run says about its model before anything is trained."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tiny_families import tiny_model
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion.run import OpenRun
from trenchcoat.runtime.runfolder import RunFolder
from trenchcoat.runtime.runlog import RunLog


@pytest.mark.parametrize("kind", ["dynamic", "default"])
def test_the_log_names_a_rotary_embedding_that_depends_on_the_length(
    kind: str, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("demo", tiny_overrides)
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=40)
    with RunLog(tmp_path, progress="plain") as log:
        run = OpenRun(recipe, RunFolder(tmp_path), log, ExitStack())
        run.write_environment(model, "sdpa", dtype=torch.float32, device=torch.device("cpu"))
    shown = "".join(capsys.readouterr())
    assert ("is 'dynamic': texts of more than 40 tokens" in " ".join(shown.split())) == (kind == "dynamic")
