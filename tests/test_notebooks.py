"""The notebooks of the documentation run from the first cell to the last, on the embedded teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_all_cells_run(notebook: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells), "commit notebooks without outputs"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
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
