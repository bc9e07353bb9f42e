"""docs/KERNELS.md shows the stored compiler report."""

from __future__ import annotations

import json
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_table_is_that_of_the_report() -> None:
    text = (REPOSITORY / "docs" / "KERNELS.md").read_text()
    table = text.split("<!-- compiler-table -->")[1].split("<!-- /compiler-table -->")[0]
    found = json.loads((REPOSITORY / "benchmarks" / "kernels_sm90.json").read_text())["terrace"]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == len(found)
    for line, (name, row) in zip(rows, found.items(), strict=True):
        counts = [row[column] for column in ("warps", "matrix", "issue", "traffic")]
        shared = round(row["shared_bytes"] / 1024)
        numbers = [row["registers"], row["stack_bytes"], shared, *counts]
        assert [cell.strip() for cell in line.strip("| ").split("|")] == [f"`{name}`", *(f"{n:,}" for n in numbers)]
        assert row["shared_bytes"] <= 227 * 1024
