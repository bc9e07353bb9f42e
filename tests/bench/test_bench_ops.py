"""The operator's benchmark runs, compares the same function, and reports what it says it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trenchcoat.bench import ops, run


def test_both_ways_of_transfer_give_the_same_gradients() -> None:
    bench = ops.Bench(300)
    y = bench.teacher()
    bench.transfer(y)
    bench.quadratic_transfer(y)
    for ours, theirs in zip(bench.student.parameters(), bench.reference.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))


def test_quick_measurement_is_written_and_printed(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    text = run("ops", quick=True, out=str(out))
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["transfer_memory_ratio"] > 0
    assert set(ops.TARGETS) <= set(result)
    assert set(result["forward_by_tokens"]) == {"128", "256", "512"}
    assert result["environment"]["implementation"] == "chunkwise"
    assert "quadratic reference" in text
    full = {**result, "targets": ops.TARGETS}
    assert "target >= 25" in ops.table(full)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [((0.5, 1.2, 3.0), 2), ((2.0, 0.9, 3.0), 3), ((0.1, 0.2, 0.3), None), ((1.0, 1.0, 1.0), 1)],
)
def test_break_even_is_where_it_stays_faster(speedups: tuple[float, ...], expected: int | None) -> None:
    rows = {str(tokens): {"speedup": speedup} for tokens, speedup in zip((1, 2, 3), speedups, strict=True)}
    assert ops.break_even(rows) == expected
