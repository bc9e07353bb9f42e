"""The operator's benchmark runs, compares implementations of the same function, and reports its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trenchcoat.bench import ops
from trenchcoat.bench.registry import load_benchmark, run_benchmark


def test_both_transfer_implementations_give_the_same_gradients() -> None:
    chunkwise, reference = ops.layer_of(300, "cpu"), ops.layer_of(300, "cpu", "reference")
    y = chunkwise.softmax().detach()
    chunkwise.transfer(y)
    ops.quadratic_transfer(reference, y)
    for ours, theirs in zip(chunkwise.student.parameters(), reference.student.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))


def test_quick_measurement_is_written_and_printed(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    text = run_benchmark("ops", quick=True, out=str(out))
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["targets"]) == 6
    assert all(row["measured"] > 0 and row["why"] == "a quick run" for row in result["targets"][:4])
    assert set(result["forward"]) == {"128", "256", "512"}
    assert result["environment"]["implementation"] == "chunkwise"
    assert "quadratic reference" in text
    assert ">= 25" in text
    full = load_benchmark("ops").judged(result)
    assert all(row["met"] == (row["measured"] >= row["wanted"]) for row in full[:4])


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [((0.5, 1.2, 3.0), 2), ((2.0, 0.9, 3.0), 3), ((0.1, 0.2, 0.3), None), ((1.0, 1.0, 1.0), 1)],
)
def test_break_even_is_where_it_stays_faster(speedups: tuple[float, ...], expected: int | None) -> None:
    rows = {
        str(tokens): {"student": {"wall": 1.0}, "softmax": {"wall": speedup}}
        for tokens, speedup in zip((1, 2, 3), speedups, strict=True)
    }
    assert ops.break_even(rows) == expected
