"""The benchmark of the students runs, and its figures are those of its record."""

from __future__ import annotations

import json
from pathlib import Path

from trenchcoat.bench.registry import run_benchmark
from trenchcoat.bench.students import TEACHER, StudentsBenchmark


def test_a_quick_run_compares_all_with_the_teacher(tmp_path: Path) -> None:
    text = run_benchmark("students", quick=True, out=str(tmp_path / "students.json"))
    found = json.loads((tmp_path / "students.json").read_text())["by_student"]
    sizes = StudentsBenchmark.quick
    assert list(found) == [TEACHER, *sizes.names]
    assert all(figure > 0 for row in found.values() for figure in row.values())
    for row in found.values():
        assert f"{row['token_milliseconds']:.4g}" in text
    key_and_value = 2 * 4 * sizes.shape.kv_heads * sizes.shape.dim * sizes.layers
    assert found[TEACHER]["cache_bytes"] == key_and_value * (sizes.context - 1)  # the last token is read with the next
    assert found["gdn"]["cache_bytes"] != found["terrace_gated"]["cache_bytes"]
