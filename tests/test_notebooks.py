"""The notebooks of the documentation run from the first cell to the last, on the embedded teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = """
model: {device: cpu, dtype: float32}
student: {window: 32, feature_map: {feature_dim: 16, init: landmarks}}
select: {rows: 1, gates: [0.5], frontier: [0.13, 0.33], frontier_rows: 2, seq_len: 128}
data: {format: text, max_rows: 20, seq_len: 128, packing: across}
transfer: {batch_size: 1, accumulation: 1, eval_batches: 1}
lora: {loss: kl, seq_len: 128, batch_size: 1, accumulation: 1, eval_batches: 1, rank: 2}
eval: {seq_len: 128, rows: 2, copy_rows: 2, length_factors: [1], batch_size: 2, baselines: false, decode_lengths: [32]}
"""
"""The recipe that settings come from in the notebooks, as `smollm2_135m` for seconds instead of half an hour."""
FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_all_cells_run(notebook: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells), "commit notebooks without outputs"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    script = tmp_path / "cells.py"
    short = tmp_path / "short.yaml"
    short.write_text(SHORT, encoding="utf-8")
    before = f"from trenchcoat.planning import choose\nchoose.CPU_RECIPE = choose.GPU_RECIPE = {str(short)!r}"
    # the second notebook's own rows are longer
    cells_of_seconds = [cell.replace('seq_len": 512', 'seq_len": 128') for cell in code]
    script.write_text("\n\n".join([before, *cells_of_seconds]), encoding="utf-8")
    settings = {
        "NOTEBOOK_MODEL": "embedded", "NOTEBOOK_DATA": "embedded", "NOTEBOOK_STEPS": "2", "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "past 2W" in done.stdout
