"""The operator's benchmark runs, compares implementations of the same function, and reports its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trenchcoat.bench import ops, timing
from trenchcoat.bench.layer import LayerSizes
from trenchcoat.bench.limits import Limits, Work, _pairs
from trenchcoat.bench.registry import load_benchmark, run_benchmark
from trenchcoat.ops import Rule


def test_both_transfer_implementations_give_the_same_gradients() -> None:
    chunkwise, reference = ops.layer_of(300, "cpu"), ops.layer_of(300, "cpu", "reference")
    y = chunkwise.softmax().detach()
    chunkwise.transfer(y)
    ops.quadratic_transfer(reference, y)
    for ours, theirs in zip(chunkwise.student.parameters(), reference.student.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))


def test_quick_measurement_is_written_and_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONG_ENOUGH", 0.02)
    out = tmp_path / "ops.json"
    text = run_benchmark("ops", quick=True, out=str(out))
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["targets"]) == 9
    assert all(row["measured"] > 0 and row["why"] == "a quick run" for row in result["targets"][:5])
    assert [row["why"] for row in result["targets"][5:8]] == ["not measured"] * 3
    assert set(result["forward"]) == {"128", "256"}
    chosen = ops.implementations("cpu")
    assert result["environment"]["implementation"] == chosen[0]
    assert [*result["forward"]["256"]] == [*chosen, "softmax"]
    assert [*result["transfer"]["seconds"]] == [*chosen, "quadratic"]
    for name, lengths in (("forward", ("128", "256")), ("training", ("256",)), ("transfer", ("256",))):
        assert all(result["limits"][name][tokens]["seconds"] > 0 for tokens in lengths)
    assert "quadratic reference" in text
    assert ">= 35" in text
    full = load_benchmark("ops").judged(result)
    assert all(row["met"] == (row["measured"] >= row["wanted"]) for row in full[:5])


def test_the_limit_counts_what_the_definition_computes() -> None:
    """Against the pairs of the reference's rule, and by hand where every chunk is full."""
    sizes = LayerSizes(heads=2, kv_heads=2, dim=8, columns=4, window=4)
    for tokens in (3, 4, 9, 30):
        position = torch.arange(tokens)
        rule = Rule(kind="terrace", window=4, scale=1.0)
        near = int(rule.is_near(position[:, None], position).sum())
        assert _pairs(tokens, 4) == near
    work = Work.of(sizes, 16)["forward"]
    far, pairs = 8, _pairs(16, 4)
    assert work.multiply_adds == 2 * (2 * pairs * 8 + far * (2 * 8 * 4 + 2 * 8 * 8))
    assert work.exponentials == 2 * (pairs + far * 2 * 8)
    assert Work.of(sizes, 8)["transfer"].multiply_adds == 2 * 2 * _pairs(8, 4) * 8
    machine = Limits(1e9, 1e8, 1e10)
    assert machine.seconds(Work(1e9, 1e8, 0)) == 2.0
    assert machine.seconds(Work(1e9, 0, 5e10)) == 5.0


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
